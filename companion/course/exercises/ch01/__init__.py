"""Exercises of Chapter 1."""
