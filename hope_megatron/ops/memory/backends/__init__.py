"""Ways to compute the memory operator on whole chunks. registry.py chooses among those that ops/memory_backends.py lists."""
