"""Exercises of Chapter 9."""
