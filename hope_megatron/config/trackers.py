"""The trackers by name. A new one is a class of `training.sinks.base.Sink` and a row here."""

from __future__ import annotations

from hope_megatron.runtime.registry import Entry, Registry

TRACKERS: Registry[Entry] = Registry(
    "tracker",
    {
        "mlflow": Entry(
            "hope_megatron.training.sinks.mlflow:MLflow", "MLflow: a server, or a SQLite file beside the runs"
        ),
        "wandb": Entry(
            "hope_megatron.training.sinks.wandb:WeightsAndBiases", "Weights & Biases, offline too (extra `wandb`)"
        ),
        "tensorboard": Entry(
            "hope_megatron.training.sinks.tensorboard:TensorBoard",
            "event files in RUN/tensorboard (extra `tensorboard`)",
        ),
        "jsonl": Entry(
            "hope_megatron.training.sinks.jsonl:JsonLines", "one JSON object per line, in a file of your choice"
        ),
    },
)
