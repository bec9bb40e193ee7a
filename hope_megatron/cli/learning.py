"""`--learn`, which eval and generate share: a model that goes on learning from what it reads."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hope_megatron.checkpoint.errors import ModelReferenceError

if TYPE_CHECKING:
    from hope_megatron.model import LanguageModel


def add_learning_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --learn and --no-learn."""
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--learn",
        nargs="*",
        metavar="KEY=VALUE",
        help="learn in context by the clocks of the model's CMS levels (the default of a model that was trained with them); "
        "keys give it clocks or change them: cms.levels.0.inner_chunk_tokens=64 cms.levels.0.inner_rate=0.01",
    )
    choice.add_argument("--no-learn", action="store_true", help="read with static CMS levels, whatever the model has")


def prepare_learning(args: argparse.Namespace, model: LanguageModel) -> bool:
    """Whether to learn in context; if so, the model has the clocks that were asked for and its parameters are frozen.

    Raises:
        ModelReferenceError: --learn, but no clock.
        ConfigError: a key that is no clock's, or a value that cannot be.
    """
    from hope_megatron.config.load import override_inner_clocks
    from hope_megatron.model.in_context import set_inner_clocks

    if args.no_learn:
        return False
    if args.learn:
        set_inner_clocks(model, override_inner_clocks(model.model_config, args.learn))
    learns = model.model_config.cms.learns_in_context
    if args.learn is not None and not learns:
        raise ModelReferenceError(
            "--learn: no CMS level of this model has a clock inside the context; give it one, for example "
            "--learn cms.levels.0.inner_chunk_tokens=64 cms.levels.0.inner_rate=0.01"
        )
    if learns:
        model.requires_grad_(False)
    return learns
