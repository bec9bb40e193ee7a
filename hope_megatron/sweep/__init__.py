"""Scaling laws: plan a sweep, run its cells, collect what they measured, fit laws to it, and recommend a run. Imports no torch."""
