"""What a person sees."""

from __future__ import annotations

import io
import logging

from hope_megatron.training.progress import Progress, configure_logging


class Terminal(io.StringIO):
    def isatty(self):
        return True


RECORD = {"train/loss": 3.14159, "train/lr": 2e-3}


def test_plain_output_has_one_line_per_record():
    stream = io.StringIO()
    progress = Progress(20, 100, stream)
    for step in range(1, 21):
        progress.after_step(step, RECORD if step % 10 == 0 else None)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("step 20/20  loss 3.142  lr 2.00e-03")
    assert "tokens/s" in lines[1] and "\x1b" not in stream.getvalue()


def test_the_smoothed_loss_stands_beside_that_of_one_step_and_both_are_in_the_log(tmp_path):
    stream = io.StringIO()
    progress = Progress(40, 100, stream)
    configure_logging(0, tmp_path / "train.log", progress)
    losses = [4.0 if step % 2 else 2.0 for step in range(1, 41)]
    for step, loss in enumerate(losses, 1):
        progress.after_step(step, {"train/loss": loss, "train/lr": 1e-3} if step % 20 == 0 else None, loss)
    configure_logging(1, tmp_path / "none.log", Progress(1, 1, io.StringIO()))
    weights = [0.95 ** (40 - step) for step in range(1, 41)]
    mean = sum(w * loss for w, loss in zip(weights, losses)) / sum(weights)
    assert f"step 40/40  loss 2.000  (smoothed {mean:.3f})" in stream.getvalue()
    logged = (tmp_path / "train.log").read_text().splitlines()
    assert [line.partition("steps: ")[2] for line in logged] == stream.getvalue().splitlines()
    assert len(logged) == 2 and not (tmp_path / "none.log").exists()


def test_terminal_line_renews_itself_and_messages_scroll_above_it(tmp_path):
    stream = Terminal()
    progress = Progress(2, 100, stream)
    configure_logging(0, tmp_path / "train.log", progress)
    progress.after_step(1, RECORD)
    logging.getLogger("hope_megatron.test").info("a message")
    progress.after_step(2, RECORD)
    progress.close()
    configure_logging(1, tmp_path / "none.log", Progress(1, 1, io.StringIO()))
    shown = stream.getvalue()
    assert shown.count("\n") == 2 and shown.endswith("\n")
    assert "\r\x1b[Ka message\n" in shown
    assert "a message" in (tmp_path / "train.log").read_text()


def test_other_ranks_speak_only_of_trouble(tmp_path):
    stream = io.StringIO()
    configure_logging(3, tmp_path / "train.log", Progress(1, 1, stream))
    logging.getLogger("hope_megatron.test").info("quiet")
    logging.getLogger("hope_megatron.test").warning("loud")
    assert stream.getvalue() == "rank 3: loud\n"
    assert not (tmp_path / "train.log").exists()
