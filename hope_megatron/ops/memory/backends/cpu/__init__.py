"""HOPE's own rule as compiled code for CPUs (scan.py)."""
