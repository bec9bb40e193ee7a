"""Held-out tokens from shards or text, and the baselines counted on training shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.tokenizer import Tokenizer

if TYPE_CHECKING:
    from hope_megatron.convert.open_model import OpenModel
    from hope_megatron.eval.baselines import NGramCounts

_PIECE_TOKENS = 1 << 16


class HeldoutDataError(ValueError):
    """Held-out data that cannot be scored."""

    is_user_error = True


def heldout_tokens(
    opened: OpenModel, text: list[Path] | None, manifest: Path | None, max_tokens: int | None
) -> np.ndarray:
    """What to score a model on: [n + 1] ids, n targets, at most `max_tokens`.

    Args:
        text: UTF-8 files; otherwise
        manifest: token shards; otherwise the held-out split of the model's run.
    """
    if max_tokens is not None and max_tokens < 1:
        raise HeldoutDataError(f"--max-tokens {max_tokens} must be positive")
    if text:
        tokens = text_tokens(text, opened.tokenizer)
        return tokens if max_tokens is None else tokens[: max_tokens + 1]
    manifest = manifest or (opened.run.data.heldout if opened.run else None)
    if manifest is None:
        raise HeldoutDataError(f"{opened.name} names no held-out data; give --data MANIFEST or --text FILE")
    return manifest_tokens(manifest, opened.tokenizer, max_tokens)


def manifest_tokens(manifest: Path, tokenizer: Tokenizer, max_tokens: int | None = None) -> np.ndarray:
    """The packed token stream of a split in shard order, end marks included: [n + 1] int64, n targets.

    Args:
        manifest: manifest file or its directory.
        tokenizer: must be the one the shards were made with.
        max_tokens: stop after this many targets.
    """
    pieces, count = [], 0
    for piece in _manifest_pieces(manifest, tokenizer):
        pieces.append(piece)
        count += len(piece)
        if max_tokens is not None and count > max_tokens:
            break
    tokens = np.concatenate(pieces)
    return tokens if max_tokens is None else tokens[: max_tokens + 1]


def text_tokens(files: list[Path], tokenizer: Tokenizer) -> np.ndarray:
    """Text files as one packed token stream: an end mark, then each file followed by one."""
    pieces = [np.array([tokenizer.eos_id])]
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise HeldoutDataError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise HeldoutDataError(f"{path} is not UTF-8 text: {error}") from error
        if not text.strip():
            raise HeldoutDataError(f"{path} holds no text; leave it out")
        pieces += [tokenizer.encode(text), np.array([tokenizer.eos_id])]
    return np.concatenate(pieces)


def manifest_counts(manifest: Path, tokenizer: Tokenizer) -> NGramCounts:
    """Token and pair counts of a split: what the baselines know."""
    from hope_megatron.eval.baselines import count_ngrams

    return count_ngrams(_manifest_pieces(manifest, tokenizer), tokenizer.vocab_size)


def _manifest_pieces(path: Path, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Consecutive pieces of the packed stream."""
    from data_pipeline.manifest import Manifest
    from data_pipeline.stream import TokenStream

    manifest = Manifest.load(path)
    if manifest.tokenizer_sha256 != tokenizer.digest:
        raise HeldoutDataError(
            f"the shards of {path} were made with another tokenizer (SHA-256 {manifest.tokenizer_sha256[:12]}, "
            f"the model's is {tokenizer.digest[:12]}); prepare the text again with the model's, or give it with --text"
        )
    stream = TokenStream(manifest, min(_PIECE_TOKENS, manifest.tokens + manifest.documents - 1), shuffle=False)
    for number, window in enumerate(stream.windows()):
        yield window if number == 0 else window[1:]  # a window begins with the last token of the one before
