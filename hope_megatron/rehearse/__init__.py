"""One training step of one rank of a job of any size, rehearsed without a GPU and without peers: `hope rehearse`.

`step.py` runs the real engine on fake tensors; `watch.py` sees every operator; `depth.py` makes the whole model of one and two
layers; `verdict.py` prices what was counted for a GPU.
"""
