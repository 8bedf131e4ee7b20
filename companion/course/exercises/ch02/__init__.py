"""Exercises of Chapter 2."""
