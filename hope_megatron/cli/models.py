"""What the commands that use a model in this process share."""

from __future__ import annotations

import warnings

from hope_megatron.runtime.process import apply_process_environment, available_cpus

MODEL_HELP = "a run directory (its newest checkpoint), RUN@STEP, a checkpoint, or an exported Hugging Face directory"


def prepare_process(num_threads: int | None = None) -> None:
    """Set up a process that uses a model by itself. Call before anything imports torch.

    Args:
        num_threads: CPU threads of torch operators; None for every core.
    """
    apply_process_environment(num_threads or available_cpus())
    # Megatron-Core reports at every import that optional CUDA packages are absent; `hope doctor` says so when asked.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
