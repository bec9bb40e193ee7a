"""Ways to compute the memory operator on whole chunks. registry.py chooses among those that installed.py lists."""
