"""The data of a run: opened, checked against tokenizer and model, mixed, and taken up again at a saved position. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from data_pipeline import (
    Ledger,
    MixtureStream,
    SampleStream,
    ShardCache,
    Tokenizer,
    TokenStream,
    load_tokenizer,
    resume,
)
from data_pipeline.cache import default_directory
from hope_megatron.config import ConfigError, RunConfig
from hope_megatron.config.training import DataConfig
from hope_megatron.training.epochs import Passes, planned_passes
from hope_megatron.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from hope_megatron.training.batches import SampleSource
    from hope_megatron.training.run import ContinueData


def open_sources(config: RunConfig, ledger: Ledger | None = None) -> tuple[SampleStream, TokenStream | None]:
    """The training and held-out samples of a run, checked against its tokenizer and model.

    Args:
        ledger: where corrupt shards are recorded with data.on_corrupt=skip; that of the run by default.

    Raises:
        DataError: if manifests, shards or tokenizer cannot be used.
        ConfigError: if they do not fit the model or each other.
    """
    data, seq_length = config.data, config.training.seq_length
    tokenizer = load_tokenizer(data.tokenizer)
    cache = shard_cache(data)
    ledger = ledger or Ledger(RunDirectory(config.run_dir).data_ledger)
    skip_corrupt = ledger if data.on_corrupt == "skip" else None
    sets = {
        name: TokenStream(path, seq_length, data.seed, skip_corrupt=skip_corrupt, cache=cache)
        for name, path in {"train": data.train, **data.mix_with}.items()
    }
    heldout = TokenStream(data.heldout, seq_length, shuffle=False, cache=cache) if data.heldout else None
    for name, stream in sets.items():
        _check_fits(stream, "data.train" if name == "train" else f"data.mix_with.{name}", tokenizer, config)
    if heldout is not None:
        _check_fits(heldout, "data.heldout", tokenizer, config)
    return _mixed(sets, config), heldout


def shard_cache(data: DataConfig) -> ShardCache | None:
    """The local cache of a run's shards; None if all of them are local."""
    locations = [data.train, data.heldout, *data.mix_with.values()]
    if not any(isinstance(location, str) for location in locations):
        return None
    return ShardCache(data.cache_dir or default_directory(), int(data.cache_gib * 2**30))


def _check_fits(stream: TokenStream, name: str, tokenizer: Tokenizer, config: RunConfig) -> None:
    if stream.manifest.tokenizer_sha256 != tokenizer.digest:
        raise ConfigError(
            f"{name} ({stream.manifest.location}) was made with another tokenizer than data.tokenizer "
            f"({config.data.tokenizer}): digests {stream.manifest.tokenizer_sha256[:12]} and {tokenizer.digest[:12]}; "
            "use the tokenizer that lies beside the shards, or prepare the data again"
        )
    if stream.manifest.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"{name} has a vocabulary of {stream.manifest.vocab_size} tokens, model.vocab_size is "
            f"{config.model.vocab_size}; set model.vocab_size={stream.manifest.vocab_size}"
        )


def _mixed(sets: dict[str, TokenStream], config: RunConfig) -> SampleStream:
    if not config.data.mix_with:
        return sets["train"]
    schedule = [(phase.from_tokens, phase.weights) for phase in config.data.mix_schedule]
    return MixtureStream(sets, schedule, config.data.seed)


def continuing(config: RunConfig, data_transition: str | None) -> ContinueData:
    """Take the data up at a saved position; changed data only with a reason, which goes to the run's data ledger."""

    def continue_data(source: SampleSource, state: Mapping[str, Any]) -> SampleSource:
        assert isinstance(source, SampleStream)
        stream, number = resume(source, state, data_transition=data_transition is not None)
        if stream.fingerprint != state["fingerprint"] and int(os.environ.get("RANK", 0)) == 0:
            step = number // config.training.global_batch_size
            Ledger(RunDirectory(config.run_dir).data_ledger).record_transition(
                number,
                state["fingerprint"],
                stream.fingerprint,
                step=step,
                reason=data_transition or "",
                old_recipe=state.get("recipe"),
            )
        return stream

    return continue_data


def count_passes(config: RunConfig) -> tuple[list[Passes], str]:
    """How often a run will read its data sets; or none, and why they cannot be counted."""
    try:
        return planned_passes(open_sources(config)[0], config), ""
    except Exception as error:
        if not getattr(error, "is_user_error", False):
            raise
        return [], str(error)
