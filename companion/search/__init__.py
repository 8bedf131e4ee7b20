"""Completions from a policy, and the search for good ones. Chapter 3."""

from companion.search.results import Logprobs, Sample
from companion.search.sampling import Policy

__all__ = ["Logprobs", "Policy", "Sample"]
