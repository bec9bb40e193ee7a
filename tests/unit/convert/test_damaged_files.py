"""Fuzz with fixed seeds: whatever happens to a file, it is found and named, and nothing ends in a traceback."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hope_megatron.checkpoint.find import find_checkpoint
from hope_megatron.checkpoint.format import Checkpoint, CheckpointDamagedError
from hope_megatron.checkpoint.unsharded import read_unsharded
from hope_megatron.convert.huggingface.export import export_huggingface, load_huggingface
from hope_megatron.convert.torch_dist import read_torch_dist, write_torch_dist
from hope_megatron.generation.decoder import Decoder
from hope_megatron.generation.errors import GenerationError
from hope_megatron.generation.state_file import load_state, save_state
from hope_megatron.runtime.records import append_record, parse_records, read_records, seal
from hope_megatron.testing.mutations import mutations
from hope_megatron.training.metrics import MetricsFile, read_metrics
from launch.attempts import CRASHED, STOPPED, History, newest_checkpoint_step


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    checkpoint.verify()
    checkpoint.check_description()
    return {name: checkpoint.full_tensor(name) for name in checkpoint.parameters}


def same_bytes(left: Path, right: Path) -> bool:
    names = {path.relative_to(left) for path in left.rglob("*") if path.is_file()}
    return names == {path.relative_to(right) for path in right.rglob("*") if path.is_file()} and all(
        (left / name).read_bytes() == (right / name).read_bytes() for name in names
    )


def test_a_damaged_checkpoint_is_found_or_holds_the_same_tensors(make_checkpoint, tmp_path: Path) -> None:
    good = make_checkpoint().path
    expected = read_all(Checkpoint(good))
    harmless = []
    for path, what in mutations(good, tmp_path / "copy" / good.name, count=400, seed=1):
        try:
            found = read_all(Checkpoint(path))
        except CheckpointDamagedError as error:
            assert str(path) in str(error), what
        else:  # white space of the manifest, or a file that nobody needs to have
            assert all(torch.equal(found[name], expected[name]) for name in expected), what
            harmless.append(what)
    assert all("manifest.json" in what or "probe" in what for what in harmless), harmless
    assert len(harmless) < 40


def test_the_newest_good_checkpoint_stands_in_for_damaged_ones(
    make_checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = make_checkpoint().path
    run = good.parents[1]
    for path, what in mutations(good, good.with_name("step-00000050"), count=60, seed=2):
        caplog.clear()
        found = find_checkpoint(str(run)).path
        if found != path:
            assert found == good, what
            if (path / "manifest.json").exists():
                assert any("step-00000050 is damaged" in message for message in caplog.messages), what
    (good.with_name("step-xyz")).mkdir()
    (good.with_name("step-xyz") / "manifest.json").write_text("{}")
    shutil.rmtree(good.with_name("step-00000050"))
    assert newest_checkpoint_step(run) == 40


def test_what_the_manifest_does_not_know_is_never_read(make_checkpoint) -> None:
    path = make_checkpoint().path
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("checkpoint.json", "rank-00001.safetensors"):
        files = {key: value for key, value in manifest["files"].items() if key != name}
        (path / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
        with pytest.raises(CheckpointDamagedError, match=name):
            read_all(Checkpoint(path))
    files = {key: value for key, value in manifest["files"].items() if key != "probe.safetensors"}
    (path / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
    assert find_checkpoint(str(path)).probe is None


@pytest.mark.parametrize("where", ["../outside", "/etc/hostname", "a/b"])
def test_a_manifest_names_nothing_outside(make_checkpoint, where: str) -> None:
    path = make_checkpoint().path
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][where] = {"sha256": "0" * 64, "size": 1}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointDamagedError, match="not a digest and size of a file beside it"):
        Checkpoint(path)


def test_a_damaged_export_is_found(make_checkpoint, tokenizer, tmp_path: Path) -> None:
    good = tmp_path / "model"
    export_huggingface(make_checkpoint(), good, tokenizer)
    harmless = []
    for path, what in mutations(good, tmp_path / "copy", count=150, seed=3):
        try:
            load_huggingface(path)
        except Exception as error:
            assert getattr(error, "is_user_error", False), (what, error)
        else:
            harmless.append(what)
    free = ("README.md", "generation_config.json", "hope_digests.json: ", "hope_digests.json deleted")
    assert all(any(name in what for name in free) for what in harmless), harmless


def test_a_damaged_torch_dist_export_is_found(make_checkpoint, tmp_path: Path) -> None:
    good = tmp_path / "dist"
    write_torch_dist(read_unsharded(make_checkpoint()), good)
    for path, what in mutations(good, tmp_path / "copy", count=120, seed=4):
        try:
            read_torch_dist(path)
        except Exception as error:
            assert getattr(error, "is_user_error", False), (what, error)


def test_a_damaged_stream_state_is_found(model, tmp_path: Path) -> None:
    good = tmp_path / "good"
    decoder = Decoder(model, 1)
    decoder.append(torch.arange(40).view(1, 40))
    decoder.read_ahead()
    good.mkdir()
    save_state(good / "text.state", decoder)
    accepted = []
    for path, what in mutations(good, tmp_path / "copy", count=300, seed=5):
        try:
            found = load_state(path / "text.state", model)
        except GenerationError as error:
            assert "text.state" in str(error), what
        else:
            same = all(torch.equal(t, decoder.state.tensors()[name]) for name, t in found.state.tensors().items())
            assert same and torch.equal(found.pending, decoder.pending), what
            accepted.append(what)
    assert len(accepted) < 15, accepted  # flips in the header's own names and spaces


def write_metrics(path: Path) -> list[dict]:
    file = MetricsFile(path)
    for step in range(1, 21):
        file.append(step, {"train/loss": 5.0 / step, "train/tokens": 64 * step})
    return read_metrics(path)


def test_damaged_metrics_cost_their_lines_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = tmp_path / "good"
    good.mkdir()
    expected = write_metrics(good / "metrics.jsonl")
    assert [record["step"] for record in expected] == list(range(1, 21))
    for path, what in mutations(good, tmp_path / "copy", count=400, seed=6):
        caplog.clear()
        before = (path / "metrics.jsonl").read_bytes() if (path / "metrics.jsonl").exists() else b""
        with caplog.at_level(logging.WARNING):
            MetricsFile(path / "metrics.jsonl").drop_after(100)
        found = read_metrics(path / "metrics.jsonl")
        assert all(record in expected for record in found), what
        lost = [record for record in expected if record not in found]
        if "flipped" in what or "noise" in what:
            assert len(lost) <= 2, what
        ended = before.endswith(b"\n") or before.count(b"\n") < 19
        if lost and ended and "taken out" not in what and before.count(b"\n") >= 19:
            assert "is not what was written" in caplog.text, what


def test_damaged_attempts_cost_their_lines_and_no_more(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    history = History(good / "attempts.jsonl")
    for number in range(6):
        history.start("7", 0, ["node1", "node2"], 5 * number)
        history.end(CRASHED if number % 2 else STOPPED, "reason", 5 * number + 5, ["node2"] if number == 3 else [])
    expected = {attempt.number: attempt for attempt in history.attempts}
    for path, what in mutations(good, tmp_path / "copy", count=400, seed=7):
        read = History(path / "attempts.jsonl")
        for attempt in read.attempts:
            known = expected[attempt.number]
            assert (attempt.started, attempt.nodes, attempt.step) == (known.started, known.nodes, known.step), what
            assert attempt.ended in (None, known.ended), what
        read.start("8", 0, ["node3"], 5)
        assert History(path / "attempts.jsonl").attempts[-1].nodes == ("node3",), what


def test_a_seal_is_of_the_very_line(tmp_path: Path) -> None:
    record = {"event": "x", "text": 'a "quoted", "crc": "00000000"} text', "n": 0.1}
    append_record(tmp_path / "r", record)
    append_record(tmp_path / "r", {"n": 2})
    assert read_records(tmp_path / "r") == ([record, {"n": 2}], [])
    line = seal(record).encode()
    for place in range(len(line)):
        flipped = bytearray(line)
        flipped[place] ^= 4
        records, damaged = parse_records(bytes(flipped) + b"\n" + seal({"n": 2}).encode() + b"\n")
        assert records == [{"n": 2}] and damaged == [1], flipped


def test_files_without_seals_are_read_as_they_stand() -> None:
    assert parse_records(b'{"a": 1}\nnot json\n{"b": 2}\n{"c"') == ([{"a": 1}, {"b": 2}], [2])


@pytest.fixture
def anything_goes(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        (tmp_path / "launch").mkdir(exist_ok=True)
        for name in (
            "summary.json",
            "tracking.json",
            "launch/submission.json",
            "launch/attempts.jsonl",
            "metrics.jsonl",
        ):
            (tmp_path / name).write_bytes(content)
        return tmp_path

    return write


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[]", b"7", b"null", b'{"a": 1}', b'{"complete": 1, "step": "x"}', b"[" * 100_000]
)
def test_small_files_of_any_content_never_end_in_a_traceback(anything_goes, content: bytes) -> None:
    from hope_megatron.training.callbacks import is_summarized
    from hope_megatron.training.run_directory import RunDirectory
    from hope_megatron.training.tracking import read_tracking
    from launch.attempts import is_finished
    from launch.errors import LaunchError
    from launch.status import run_status

    run = anything_goes(content)
    assert not is_finished(run, 3)
    is_summarized(RunDirectory(run))
    read_tracking(RunDirectory(run))
    with pytest.raises(LaunchError):
        run_status(run)
