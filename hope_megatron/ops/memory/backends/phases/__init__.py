"""The memory operator in phases: only what depends on weights that change stands in a loop over chunks (scan.py)."""
