"""One small file a protocol. Chapter 6."""
