"""Exercises of Chapter 7."""
