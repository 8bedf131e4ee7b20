"""Exercises of Chapter 4."""
