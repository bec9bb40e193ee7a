"""What `hope generate` reads before it writes."""

from __future__ import annotations

import argparse
import io
import sys

import pytest

from hope_megatron.cli.generate import _prompts, add_arguments
from hope_megatron.cli.main import main


def prompts(*arguments: str) -> list[str] | None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return _prompts(parser.parse_args(["model", *arguments]))


def test_prompts_follow_the_file(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("The key is 7421.\n")
    assert prompts("--file", str(book)) == ["The key is 7421.\n"]
    questions = ("--prompt", "The key is", "--prompt", "Not")
    assert prompts("--file", str(book), *questions) == ["The key is 7421.\nThe key is", "The key is 7421.\nNot"]
    assert prompts(*questions) == ["The key is", "Not"]
    book.write_bytes(b"\xef\xbb\xbfThe key")  # as some editors save it
    assert prompts("--file", str(book)) == ["The key"]


@pytest.mark.parametrize("arguments", [(), ("--file", "-")])
def test_standard_input_is_a_prompt(monkeypatch, arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO("piped"))
    assert prompts(*arguments) == ["piped"]


def test_a_terminal_is_asked(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    assert prompts() is None


def test_learning_the_rest_needs_a_state_to_keep(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "RUN", "--prompt", "x", "--learn-rest"]) == 2
    assert "give --state FILE with it" in capsys.readouterr().err
