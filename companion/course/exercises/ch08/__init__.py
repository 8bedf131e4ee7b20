"""Exercises of Chapter 8."""
