"""The `hope` command: light to start, one message for a mistake, the right exit codes."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator

import pytest

from hope_megatron.cli.main import COMMANDS, command_parser, main

HEAVY = ("torch", "megatron", "deepspeed", "mlflow", "rich", "sentencepiece", "matplotlib")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([*name.split(), "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments):
    code = f"""
import sys
from hope_megatron.cli.main import main
try:
    main({arguments!r})
except SystemExit as leave:
    assert leave.code == 0, leave.code
print("heavy:", sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    output = run_python(code)
    assert output.splitlines()[-1] == "heavy: []"
    assert "usage: hope" in output or "hope_megatron 0" in output


def test_help_lists_every_command(capsys):
    assert main([]) == 2
    listed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in listed
        assert command.help in listed


ACTS = {
    "quickstart", "train", "sweep run", "sweep report", "generate", "completion", "serve", "checkpoint reshard",
    "checkpoint average", "checkpoint weights", "export", "import", "convert",
}  # fmt: skip
"""Commands that do or write something, and print no facts: everything else reads, and takes --json."""


def test_every_reading_command_prints_json():
    def leaves(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, bool]]:
        actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        for action in actions:
            for word, below in action.choices.items():
                yield from leaves(f"{name} {word}", below)
        if not actions:
            yield name, any("--json" in action.option_strings for action in parser._actions)

    found = dict(leaf for name in COMMANDS for leaf in leaves(name, command_parser(name)))
    assert {name for name, json in found.items() if not json} == ACTS


def test_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as leave:
        main(["trian", "x.yaml"])
    assert leave.value.code == 2
    assert "no command 'trian'; did you mean train?" in capsys.readouterr().err


def test_mistake_of_the_user_is_one_message(capsys):
    assert main(["plan", "hope_tinny"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no configuration named 'hope_tinny'")
    assert "did you mean hope_tiny?" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "arguments, option",
    [
        (["needles", "RUN", "--steps", "3"], "--steps"),
        (["languages", "--data", "novels"], "--data"),
        (["ablations", "--hope", "memory.eta_init=0.5"], "--hope"),
        (["classes", "--lengths", "64"], "--lengths"),
    ],
)
def test_an_option_that_a_suite_would_ignore_is_refused(arguments, option, capsys):
    assert main(["eval", "suite", *arguments]) == 2
    assert f"has no use for {option}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "suite", "recall", "--quick", "--out"],
        ["eval", "memory", "RUN", "--png"],
        ["generate", "RUN", "--prompt", "x", "--state"],
    ],
    ids=" ".join,
)
def test_a_file_that_cannot_be_written_is_refused_before_any_work(command, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("in the way of a directory")
    assert main([*command, str(file / "result")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write") and str(file / "result") in error
    assert file.read_text() == "in the way of a directory"


def test_a_directory_is_no_file_to_write(tmp_path, capsys):
    assert main(["eval", "suite", "recall", "--quick", "--json", str(tmp_path)]) == 2
    assert "it is a directory" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("hope_megatron.cli.plan.run", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["plan", "hope_tiny"])


def test_interrupt(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hope_megatron.cli.plan.run", interrupted)
    assert main(["plan", "hope_tiny"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_options_may_stand_between_overrides(capsys):
    assert main(["plan", "hope_tiny", "training.seq_length=64", "--json", "training.global_batch_size=2"]) == 0
    assert '"tokens_per_step": 128' in capsys.readouterr().out


@pytest.mark.parametrize("command", [["plan", "hope_tiny", "--json"], ["list", "formats"]], ids=["long", "short"])
def test_reader_that_leaves_early_is_no_error(command):
    """Output that fills no buffer is written at the very end."""
    code = f"import sys; from hope_megatron.cli.main import main; sys.exit(main({command}))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1


def test_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "hope_megatron", "--version"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert done.stdout.startswith("hope_megatron ")
