"""Adapters of libraries that compute a part of a step; runtime/step_parts.py says which, and when."""
