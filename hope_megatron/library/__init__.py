"""What `import hope_megatron` offers beside layers and optimizers: models of runs, text from them, their scores."""

from hope_megatron.library.runs import Run, evaluate, generate, load_model, load_weights

__all__ = ["Run", "evaluate", "generate", "load_model", "load_weights"]
