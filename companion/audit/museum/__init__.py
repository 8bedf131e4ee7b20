"""Specimens of silent bugs, each caught by the audit under its name. Chapter 9."""
