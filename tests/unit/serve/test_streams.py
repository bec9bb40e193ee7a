"""Stop strings across tokens, turns of a chat, states in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("prometheus_client", reason="`pip install -e '.[serve]'` brings it")
pytest.importorskip("transformers", reason="the server runs the exported model")

from hope_megatron.convert.huggingface.model.cache_hope import HopeCache
from hope_megatron.generation.sampling import SamplingOptions
from hope_megatron.serve.engine import Engine
from hope_megatron.serve.errors import ServeError
from hope_megatron.serve.service import _next_turn
from hope_megatron.serve.session_file import load_session, save_session
from hope_megatron.serve.streams import Piece, Stream, StreamOptions, draw_all


class Letters:
    """A token is a letter; 0 ends."""

    eos_id = 0

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(96 + i) for i in ids)


def drawn(text: str, **options: Any) -> tuple[list[Piece], Stream]:
    """A stream for which `text` is drawn, letter by letter ("." ends it)."""
    pieces: list[Piece] = []
    stream = Stream(Letters(), [1], StreamOptions(sampling=SamplingOptions(temperature=0), **options), pieces.append)
    for letter in text:
        if not stream.finished:
            token = 0 if letter == "." else ord(letter) - 96
            draw_all([stream], torch.nn.functional.one_hot(torch.tensor([token]), 27) * 9.0)
    if stream.finished:
        stream.end(None)
    return pieces, stream


@pytest.mark.parametrize(
    ("text", "stop", "said", "reason"),
    [
        ("abcdef", ("cd",), "ab", "stop"),
        ("abcdef", ("ef", "bcd"), "a", "stop"),
        ("aabaac", ("aac",), "aab", "stop"),
        ("abc.", ("cd",), "abc", "stop"),
        ("abcdef", ("zz", "fg"), "abcdef", "length"),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], said: str, reason: str) -> None:
    pieces, stream = drawn(text, max_tokens=6, stop=stop)
    assert "".join(piece.text for piece in pieces) == said and pieces[-1].finish == reason
    assert sum(piece.finish is not None for piece in pieces) == 1
    assert stream.hidden == (
        "" if reason == "length" or text.endswith(".") else text[len(said) :][: len(stream.hidden)]
    )
    (at_once,), _ = drawn(text, max_tokens=6, stop=stop, whole=True)
    assert (at_once.text, at_once.finish, at_once.num_tokens) == (said, reason, pieces[-1].num_tokens)
    # what cannot begin a stop string is said at once
    assert [piece.text for piece in drawn("ab", max_tokens=6, stop=("xy",))[0]] == ["a", "b"]


def test_logprobs_go_with_their_text_once() -> None:
    pieces, _ = drawn("abcz", max_tokens=4, stop=("bcd",), top_logprobs=2)
    assert [[entry.token for entry in piece.logprobs] for piece in pieces] == [[1], [2, 3, 26]]
    assert pieces[0].logprobs[0].top[0][0] == 1 and len(pieces[0].logprobs[0].top) == 2


def test_logits_that_are_not_finite_end_the_stream() -> None:
    pieces: list[Piece] = []
    stream = Stream(Letters(), [1], StreamOptions(max_tokens=3), pieces.append)
    draw_all([stream], torch.full((1, 27), float("nan")))
    stream.end(None)
    assert pieces[-1].finish == "error" and pieces[-1].error is not None and pieces[-1].error.status == 500


def test_turns_of_a_chat() -> None:
    assert _next_turn("User: b\nAssistant:", "\nUser:") == " b\nAssistant:"
    assert _next_turn("User: b\nAssistant:", "") == "\nUser: b\nAssistant:"


def test_states_come_back_from_files_or_not_at_all(tmp_path: Path) -> None:
    layers = ((torch.arange(3.0)[None], None), (torch.ones(1, 2), 7))
    save_session(tmp_path / "a", HopeCache(layers, 5, 0), [4, 2], {"name": "x"})
    cache, pending, about = load_session(tmp_path / "a", HopeCache(layers, 0, 0))
    assert (cache.position, pending, about) == (5, [4, 2], {"name": "x"})
    assert torch.equal(cache.layers[0][0], layers[0][0]) and cache.layers[0][1] is None and cache.layers[1][1] == 7
    content = (tmp_path / "a").read_bytes()
    for changed in (content.replace(b'"x', b'"y').replace(b'\\"x', b'\\"y'), content[:-1] + b"\x01", b"", content[:40]):
        assert changed != content
        (tmp_path / "b").write_bytes(changed)
        with pytest.raises(ServeError, match="damaged"):
            load_session(tmp_path / "b", HopeCache(layers, 0, 0))


def test_a_model_that_fails_fails_its_streams_and_no_more_are_taken(tokenizer: Any) -> None:
    class Broken(torch.nn.Linear):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("out of memory")

    engine, pieces = Engine(Broken(1, 1)), []
    stream = Stream(tokenizer, [1, 2], StreamOptions(max_tokens=3), pieces.append)
    engine.submit(stream)
    engine._thread.join(10)
    assert pieces[-1].error.status == 500 and engine.failure is not None
    with pytest.raises(ServeError, match="shutting down"):
        engine.submit(stream)
