"""HOPE's own rule with its backward written by hand, in PyTorch's operators (scan.py)."""
