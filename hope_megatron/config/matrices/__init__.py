"""Where matrices lie in flat vectors, who orthogonalises them, and what an update costs. No tensors: plans are made of it too."""
