"""Exercises of Chapter 3."""
