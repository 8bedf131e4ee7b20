"""Exercises of Chapter 6."""
