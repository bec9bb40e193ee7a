"""The training loop: step, loop, callbacks, metrics, tracking. Batches come through a small Protocol."""
