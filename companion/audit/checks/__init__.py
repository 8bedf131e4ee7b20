"""What an audit looks for, a room a file. Chapter 9."""
