"""The adapter gives lm-evaluation-harness what a plain computation gives, in one process and in two."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[eval]'")

from data_pipeline.open_tokenizer import load_tokenizer
from hope_megatron.cli import eval_lm
from hope_megatron.cli.main import main
from hope_megatron.eval.harness import HarnessError, HarnessModel, evaluate_tasks

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
DOCUMENT = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
CONTINUE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
QUESTIONS = [
    {"question": f"def function_{i}(", "choices": ["argument", f"value={i}", "return"], "label": i % 3}
    for i in range(7)
]


@pytest.fixture(scope="module")
def model(opened) -> HarnessModel:
    return HarnessModel(opened.model, opened.tokenizer, window_tokens=16, batch_size=3)


@pytest.fixture
def tasks(tmp_path, monkeypatch, model):
    """A directory with one task of each kind; the cache of data sets is the test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    answer = model._generate("def function_3(", {"until": ["\n"], "max_gen_toks": 6})
    rows = {
        "choice": (CHOICE, QUESTIONS),
        "document": (DOCUMENT, [{"text": f"def function_{i}(argument):\n    return argument\n"} for i in range(4)]),
        "continue": (
            CONTINUE,
            [{"question": "def function_3(", "answer": answer}, {"question": "x", "answer": "no such"}],
        ),
    }
    directory = tmp_path / "tasks"
    directory.mkdir()
    for name, (form, documents) in rows.items():
        file = directory / f"{name}.jsonl"
        file.write_text("".join(json.dumps(document) + "\n" for document in documents))
        (directory / f"{name}.yaml").write_text(form.format(name=f"tiny_{name}", file=file))
    return directory


def log_likelihood(opened, context, continuation):
    """The definition: one row, no batches, no windows."""
    ids = torch.tensor([[opened.tokenizer.eos_id, *context, *continuation]])
    logits = opened.model(ids).logits.log_softmax(-1)[0, len(context) : -1]
    picked = torch.tensor(continuation)
    return float(logits.gather(1, picked[:, None]).sum()), bool((logits.argmax(-1) == picked).all())


def test_rows_of_different_lengths_score_as_if_alone(opened, model):
    pairs = [
        (opened.tokenizer.encode("def function_1(" * n).tolist(), opened.tokenizer.encode("argument" * m).tolist())
        for n, m in ((1, 1), (4, 2), (0, 3), (2, 9), (9, 1))
    ]
    for found, (context, continuation) in zip(model._score(pairs), pairs):
        total, greedy = log_likelihood(opened, context, continuation)
        assert found[0] == pytest.approx(total, rel=1e-4) and found[1] == greedy


def test_greedy_continuations_are_said_to_be_greedy(opened, model):
    context = opened.tokenizer.encode("def function_1(").tolist()
    ids = torch.tensor([[opened.tokenizer.eos_id, *context]])
    best = int(opened.model(ids).logits[0, -1].argmax())
    (first, second) = model._score([(context, [best]), (context, [(best + 1) % 300])])
    assert first[1] and not second[1] and first[0] > second[0]


def test_documents_are_never_truncated(opened, model):
    text = "def function_5(argument, value=5):\n" * 30  # far longer than the window
    ids = opened.tokenizer.encode(text).tolist()
    (found,) = model.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    assert found == pytest.approx(log_likelihood(opened, [], ids)[0], rel=1e-4)


def instance(*args: str) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def test_a_continuation_that_merges_with_its_context_is_tokenized_alone(opened, model):
    """With `target_delimiter: ""` "a" and "r" make one token, "ar", and there is no place to cut."""
    encode = opened.tokenizer.encode
    cases = [("def function_1(a", "r"), ("def function_1(a", "rgument"), ("va", "lue=")]
    assert any(len(encode(a + b)) <= len(encode(a)) for a, b in cases)  # nothing would be left
    assert any(len(encode(a + b)) > len(encode(a)) for a, b in cases)  # another continuation would be left
    for (context, continuation), found in zip(cases, model.loglikelihood([instance(*case) for case in cases])):
        expected = log_likelihood(opened, encode(context).tolist(), encode(continuation).tolist())
        assert found[0] == pytest.approx(expected[0], rel=1e-4) and found[1] == expected[1] and found[0] < -1e-3
    # choices that merge with their context do not tie at the best score there is
    ties = model.loglikelihood([instance("def function_1(a", choice) for choice in ("r", "rg", "rgument")])
    assert len({total for total, _ in ties}) == 3 and all(total < -1e-3 for total, _ in ties)
    # where nothing merges it is cut as one text; spaces go with what follows
    (found,) = model.loglikelihood([instance("def function_1(argument, ", "value=1):")])
    assert found[0] == pytest.approx(
        log_likelihood(opened, encode("def function_1(argument,").tolist(), encode(" value=1):").tolist())[0], rel=1e-4
    )


def test_a_tokenizer_that_begins_texts_with_a_space(opened, tmp_path):
    """A dummy prefix, as in Llama: it is no part of a continuation."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["def function(argument, value=1): return argument"] * 50), vocab_size=300, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", model_prefix=str(tmp_path / "llama"), pad_id=3,
        hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "llama.model")
    harness = HarnessModel(opened.model, tokenizer, window_tokens=16)
    pieces = lambda ids: [tokenizer._processor.id_to_piece(i) for i in ids]  # noqa: E731
    head, tail = harness._encode_pair("argu", "ment")
    assert pieces(tokenizer.encode("ment"))[0].startswith("\u2581")
    assert pieces(head)[0].startswith("\u2581") and not pieces(tail)[0].startswith("\u2581")
    assert "".join(pieces(head + tail)) == "\u2581argument"


@pytest.mark.parametrize("context", ["", "def", "def "])
def test_an_empty_continuation_is_refused(model, context):
    with pytest.raises(HarnessError, match="always the likeliest"):
        model.loglikelihood([instance("x", "y"), instance(context, "")])


def test_an_empty_document_has_likelihood_one(opened, model):
    assert model.loglikelihood_rolling([instance(""), instance("")]) == [0.0, 0.0]
    empty, some = model.loglikelihood_rolling([instance(""), instance("def")])
    assert empty == 0.0 and some == pytest.approx(
        log_likelihood(opened, [], opened.tokenizer.encode("def").tolist())[0], rel=1e-4
    )


def test_generation_stops_where_told(model):
    free = model._generate("def function_3(", {"until": [], "max_gen_toks": 12})
    middle = free[len(free) // 2 :][:1]
    assert model._generate("def function_3(", {"until": [middle], "max_gen_toks": 12}) == free[: free.index(middle)]
    assert len(model._generate("def function_3(", {"until": [], "max_gen_toks": 2})) < len(free)


def test_tasks_of_every_kind(opened, model, tasks):
    found = evaluate_tasks(model, ["tiny_choice", "tiny_document", "tiny_continue"], task_directory=str(tasks))
    right = 0
    for row in QUESTIONS:
        ids = [opened.tokenizer.encode(f"{row['question']} {choice}").tolist() for choice in row["choices"]]
        size = len(opened.tokenizer.encode(row["question"]))
        totals = [log_likelihood(opened, whole[:size], whole[size:])[0] for whole in ids]
        right += totals.index(max(totals)) == row["label"]
    assert found["tasks"]["tiny_choice"]["acc"]["value"] == pytest.approx(right / len(QUESTIONS))
    assert found["tasks"]["tiny_continue"]["exact_match"]["value"] == 0.5
    texts = [f"def function_{i}(argument):\n    return argument\n" for i in range(4)]
    nats = -sum(log_likelihood(opened, [], opened.tokenizer.encode(text).tolist())[0] for text in texts)
    bits = nats / sum(len(text.encode()) for text in texts) / 0.6931471805599453
    assert found["tasks"]["tiny_document"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-4)
    assert found["num_documents"]["tiny_choice"] == 7


def test_missing_data_are_named(model, tasks):
    (tasks / "gone.yaml").write_text(CHOICE.format(name="tiny_gone", file=tasks / "nowhere.jsonl"))
    with pytest.raises(HarnessError, match=r"(?s)1 task are not to be had.*tiny_gone: .*nowhere"):
        evaluate_tasks(model, ["tiny_gone"], task_directory=str(tasks))


def test_command_prints_and_writes(opened, tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_lm, "open_model", lambda *_: opened)
    files = [f"--{kind}={tmp_path / kind}" for kind in ("json", "markdown", "png")]
    arguments = ["eval", "lm", "tiny", "--tasks", "tiny_choice", "--include", str(tasks), "--limit", "3", *files]
    assert main(arguments) == 0
    assert "| tiny_choice | acc " in capsys.readouterr().out
    result = json.loads((tmp_path / "json").read_text())
    assert result["limit"] == 3 and set(result["tasks"]["tiny_choice"]) == {"acc"}
    assert (tmp_path / "markdown").read_text().startswith("| task ")
    assert (tmp_path / "png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_directory_of_tasks_that_is_none(capsys):
    assert main(["eval", "lm", "tiny", "--tasks", "x", "--include", "/no/such"]) == 2
    assert "/no/such is no directory" in capsys.readouterr().err
