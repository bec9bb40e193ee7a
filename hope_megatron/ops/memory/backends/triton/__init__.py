"""The memory operator as Triton kernels (backend.py): only what depends on weights that change stands in loops over chunks."""
