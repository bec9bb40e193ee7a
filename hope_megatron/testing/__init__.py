"""Helpers of the test suite: process launching, tolerances, tiny models."""
