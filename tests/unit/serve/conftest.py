"""A tiny model behind a real server."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.tokenizer import Tokenizer
from hope_megatron.testing.checkpoints import tokenizer

__all__ = ["tokenizer"]


class TinyRun:
    """What a `library.Run` gives, without files. float64: batches of any size draw the same tokens."""

    reference, device = "tiny", torch.device("cpu")

    def __init__(self, tokenizer: Tokenizer, mixers: tuple[str, ...] = ("memory",)) -> None:
        from hope_megatron import HopeConfig, HopeForCausalLM

        torch.manual_seed(0)
        config = HopeConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, hidden_sizes=(16,),
            memory={"chunk_tokens": 8}, layer_pattern=mixers, tie_word_embeddings=False, eos_token_id=tokenizer.eos_id,
        )  # fmt: skip
        self.tokenizer, self.model = tokenizer, HopeForCausalLM(config).double().eval()
        for parameter in self.model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(8.0)  # so that what was read matters


@pytest.fixture(scope="session")
def run(tokenizer: Tokenizer) -> TinyRun:
    return TinyRun(tokenizer)


@pytest.fixture(scope="session")
def attention_run(tokenizer: Tokenizer) -> TinyRun:
    return TinyRun(tokenizer, ("memory", "attention"))


def wait_until(condition: Callable[[], bool]) -> None:
    """Look until it holds; a minute is long on any machine."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Served:
    """A server in a thread, over a real socket."""

    def __init__(self, run: Any, **settings: Any) -> None:
        import uvicorn

        from hope_megatron.serve.app import build_app
        from hope_megatron.serve.service import Service
        from hope_megatron.serve.settings import Settings

        self.service = Service(run, Settings(**settings))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        config = uvicorn.Config(
            build_app(self.service), port=self.port, log_level="error", timeout_graceful_shutdown=10
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()), daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 90
        while not self.server.started:
            assert time.monotonic() < deadline and self.thread.is_alive()
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.port}"

    def client(self, token: str = "none") -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0, timeout=200)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(90)
        assert not self.thread.is_alive()


@pytest.fixture
def serve(run: TinyRun) -> Iterator[Callable[..., Served]]:
    """Starts servers; they are stopped behind the test."""
    started: list[Served] = []

    def start(other: TinyRun | None = None, **settings: Any) -> Served:
        started.append(Served(other or run, **settings))
        return started[-1]

    yield start
    for served in started:
        served.stop()


@pytest.fixture(scope="module")
def served_once(run: TinyRun) -> Iterator[Served]:
    """One server for many requests that are refused."""
    served = Served(run, max_body_bytes=2000)
    yield served
    served.stop()


@pytest.fixture(name="wait_until")
def wait_until_fixture() -> Callable[[Callable[[], bool]], None]:
    return wait_until


@pytest.fixture
def session_dir(tmp_path: Path) -> Path:
    return tmp_path / "sessions"
