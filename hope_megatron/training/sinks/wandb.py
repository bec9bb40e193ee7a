"""Weights & Biases, by its own client. WANDB_* variables count as everywhere: WANDB_MODE=offline, WANDB_ENTITY, WANDB_BASE_URL."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from hope_megatron.config.run import RunConfig
from hope_megatron.training.sinks.base import Opening, Sink, TrackingError, require_package

_HOST = "https://api.wandb.ai"


class WeightsAndBiases(Sink):
    """One W&B run per training run: its id is kept, and a resume goes on with it."""

    title = "Weights & Biases"

    def __init__(self, opening: Opening) -> None:
        import wandb

        config, state = opening.config, opening.state
        state.setdefault("run_id", os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
        self._run = wandb.init(
            project=project(config),
            name=os.environ.get("WANDB_NAME") or config.name,
            id=state["run_id"],
            resume="allow",
            dir=str(opening.directory.path),
            config=config.model_dump(mode="json"),
            tags=[f"{name}:{value}"[:64] for name, value in config.tracking.tags.items()],
            notes="; ".join(f"{name}: {value}" for name, value in opening.tags.items()),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )

    def send(self, step: int, time_s: float, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self, status: str, artifacts: Iterable[Path]) -> None:
        for path in artifacts:
            if path.is_file():
                self._run.save(str(path), base_path=str(path.parent), policy="now")
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)

    @classmethod
    def check(cls, config: RunConfig) -> None:
        require_package("wandb", "wandb")
        if os.environ.get("WANDB_MODE", "online") in ("online", "shared") and not has_key():
            raise TrackingError(
                f"tracking.sinks has wandb, and there is no key for {_base_url()}: run `wandb login`, set WANDB_API_KEY, or set "
                "WANDB_MODE=offline and send the run later with `wandb sync`"
            )

    @classmethod
    def where(cls, config: RunConfig) -> str:
        mode = os.environ.get("WANDB_MODE", "online")
        return f"{_base_url()}, project {project(config)}" if mode == "online" else f"{config.run_dir}/wandb ({mode})"

    @classmethod
    def is_lasting(cls, error: Exception) -> bool:
        return super().is_lasting(error) or type(error).__name__ in ("UsageError", "AuthenticationError")


def project(config: RunConfig) -> str:
    """tracking.experiment, WANDB_PROJECT, or `hope`."""
    return config.tracking.experiment or os.environ.get("WANDB_PROJECT") or "hope"


def has_key() -> bool:
    """Whether the client will find a key without asking at the terminal, which no thread of a training run may do."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        file = Path(path).expanduser() if path else None
        if file is None or not file.is_file():
            continue
        try:
            if netrc.netrc(file).authenticators(urlsplit(_base_url()).hostname or "") is not None:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _base_url() -> str:
    return os.environ.get("WANDB_BASE_URL") or _HOST
