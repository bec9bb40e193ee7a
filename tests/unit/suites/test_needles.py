"""Needles: what is asked was hidden, lengths are exact, and streaming gives what the whole gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hope_megatron.config import ParallelConfig
from hope_megatron.model import build_model
from hope_megatron.parallel.distributed import init_distributed
from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.needle_questions import BABI
from hope_megatron.suites.needle_text import KINDS, build, haystack
from hope_megatron.suites.needles import ASK, FILLER, MARK, needle_tasks
from hope_megatron.suites.running import run_suite
from hope_megatron.suites.streamed import streamed_answers
from hope_megatron.suites.suite import Cell, SuiteOptions
from hope_megatron.suites.task import IGNORE
from hope_megatron.testing.models import tiny_model


def encode(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)


def test_synthetic_questions_are_about_hidden_needles():
    for task in needle_tasks((64, 256)):
        for name, length in zip(task.bins, (64, 256)):
            batch = task.source("test", 0)(name, 20, np.random.default_rng(0))
            assert batch.tokens.shape == batch.targets.shape == (20, length)
            for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist()):
                told = [(tokens[i + 1], tokens[i + 2]) for i, t in enumerate(tokens) if t == MARK]
                question = tokens.index(ASK)
                asked = [(i, t) for i, t in enumerate(targets) if t != IGNORE]
                assert len(told) == (1 if task.name == "single" else 4)
                assert all(i > question for i, _ in asked)
                assert sum(t in FILLER for t in tokens) == length - 3 * len(told) - (length - question)
                if task.name == "multi-value":
                    assert [t for _, t in asked] == [v for _, v in told] and len({k for k, _ in told}) == 1
                    continue
                assert len(asked) == (4 if task.name == "multi-query" else 1)
                assert len({k for k, _ in told}) == {"single": 1, "last value": 2}.get(task.name, 4)
                latest, steps = dict(told), 2 if task.name == "two facts" else 1
                for i, answer in asked:
                    found = tokens[i]
                    for _ in range(steps):
                        found = latest[found]
                    assert found == answer


FILLER_TEXT = encode("Every sentence is like the last one, but for its end. ")


@pytest.mark.parametrize("kind", KINDS)
def test_text_haystacks_hold_needle_question_and_answer(kind):
    rng = np.random.default_rng(3)
    question = KINDS[kind](rng)
    with_needle, without = (
        haystack(question, 1000, FILLER_TEXT, encode, np.random.default_rng(5), hide=hide) for hide in (True, False)
    )
    for batch in (with_needle, without):
        assert batch.tokens.shape == batch.targets.shape == (1, 1000)
        read = bytes(batch.tokens[0].astype(np.uint8)).decode()
        asked = [int(t) for t in batch.targets[0] if t != IGNORE]
        assert bytes(asked).decode() == question.answer
        assert question.question in read and all(
            (needle in read) == (batch is with_needle) for needle in question.needles
        )
        last = np.flatnonzero(batch.targets[0] != IGNORE)
        assert np.array_equal(batch.tokens[0][last[1:]], batch.targets[0][last[:-1]])  # teacher forcing
    for word in question.answer.replace(" and ", " ").split():
        assert any(word in needle for needle in question.needles)
    with pytest.raises(SuiteError, match="too short"):
        haystack(question, 40, FILLER_TEXT, encode, rng)


def test_facts_are_those_of_the_first_babi_tasks():
    """Read back by rules of their own: who is where, who holds what, what lies where, who gave."""
    for seed in range(50):
        questions = {kind: ask(np.random.default_rng(seed)) for kind, ask in BABI.items()}
        for kind in ("one fact", "two facts", "three facts"):
            question, place, holder = questions[kind], {}, {}
            for who, verb, *_, what in (fact.strip(" .").split() for fact in questions[kind].needles):
                if verb == "took":
                    holder[what] = who
                else:
                    place[who] = [*place.get(who, []), what]
            asked = question.question.split()
            who = asked[2].rstrip("?") if kind == "one fact" else holder[asked[3].rstrip("?")]
            assert question.answer.strip() == place[who][-2 if kind == "three facts" else -1]
            assert len(place) == 2
        asked = questions["two arguments"].question.split()
        lies = {
            tuple(w[-4:-2] + w[-1:]): w[1] for w in (f.strip(" .").split() for f in questions["two arguments"].needles)
        }
        assert lies[(asked[2], "of", asked[5].rstrip("?"))] == questions["two arguments"].answer.strip()
        asked = questions["three arguments"].question.split()
        gave = {(w[3], w[-1]): w[0] for w in (f.strip(" .").split() for f in questions["three arguments"].needles)}
        assert gave[(asked[3], asked[5].rstrip("?"))] == questions["three arguments"].answer.strip()


def test_streaming_gives_what_the_whole_gives():
    init_distributed(ParallelConfig())
    model = build_model(tiny_model(), seed=0)
    tokens = torch.randint(61, (3, 40), generator=torch.Generator().manual_seed(0))
    targets = torch.full_like(tokens, IGNORE)
    targets[:, 5], targets[:, 30:33] = tokens[:, 6], tokens[:, 31:34]
    whole, pieces = (streamed_answers(model, tokens, targets, piece) for piece in (40, 7))
    assert torch.equal(whole.asked, torch.full((3,), 4.0)) and torch.equal(whole.right, pieces.right)
    torch.testing.assert_close(whole.nats, pieces.nats, atol=1e-4, rtol=1e-5)
    loss = model(tokens, targets).losses.sum(1)
    torch.testing.assert_close(whole.nats, loss.detach(), atol=1e-4, rtol=1e-5)


def test_the_state_of_a_stream_has_one_size_at_any_length():
    init_distributed(ParallelConfig())
    model = build_model(tiny_model(), seed=0).eval()
    with torch.no_grad():
        sizes = {n: model(torch.ones(1, n, dtype=torch.int64), return_state=True).state.num_bytes() for n in (16, 256)}
    assert sizes[16] == sizes[256]


def test_needles_of_a_model():
    init_distributed(ParallelConfig())
    model = build_model(tiny_model(vocab_size=256), seed=0)
    options = SuiteOptions(tasks=("pass-key",), seeds=1, lengths=(256,))
    results = run_suite(build(model, encode, "tiny", "tiny", 32, options), None, {}, tell=lambda line: None)
    (right,), (gained,) = (
        results.outcomes[Cell(task, "pass-key", 0)].scores["raw"].values() for task in ("answers right", "nats gained")
    )
    assert right == 0.0 and 0 < abs(gained) < 1.0


def test_facts_hide_in_prose_and_everything_in_text_that_is_named(tmp_path):
    init_distributed(ParallelConfig())
    model, read = build_model(tiny_model(vocab_size=256), seed=0), []

    def listen(text: str) -> np.ndarray:
        read.append(text)
        return encode(text)

    def texts(*kinds: str, data: tuple = ()) -> list[str]:
        read.clear()
        options = SuiteOptions(tasks=kinds, seeds=1, lengths=(256,), data=data)
        suite = build(model, listen, "tiny", "tiny", 32, options)
        for kind in kinds:
            suite.run(Cell("answers right", kind, 0))
        return [text for text in read if len(text) > 80 and "special number" not in text and "pass key" not in text]

    assert [text[:18] for text in texts("number", "pass-key")] == ["The grass is green"]  # encoded once
    (prose,) = texts("one fact")
    assert len(prose) > 2000 and "grass is green" not in prose
    (tmp_path / "novel.txt").write_text("It was a dark and stormy night. " * 20)
    assert {text[:15] for text in texts("number", "one fact", data=(tmp_path,))} == {"It was a dark a"}
