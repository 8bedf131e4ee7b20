"""Exercises of Chapter 5."""
