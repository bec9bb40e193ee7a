"""Tasks split over processes give the figures of one process."""

from __future__ import annotations

import json

import pytest

from hope_megatron.testing.distributed import run_distributed

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[eval]'")

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
LINES = [f"def function_{i}(argument, value={i}):\n    return argument + value * {i}\n" for i in range(300)]


def answer(directory):
    """What rank 0 finds, and how many questions this process answered."""
    import datasets

    from data_pipeline.open_tokenizer import load_tokenizer
    from hope_megatron.config import ParallelConfig
    from hope_megatron.eval.harness import HarnessModel, evaluate_tasks
    from hope_megatron.model import build_model
    from hope_megatron.parallel.distributed import init_distributed
    from hope_megatron.testing.models import tiny_model

    datasets.config.HF_DATASETS_CACHE = f"{directory}/cache"
    init_distributed(ParallelConfig())
    tokenizer = load_tokenizer(f"{directory}/tokenizer.model")
    model = HarnessModel(build_model(tiny_model(vocab_size=300), seed=0), tokenizer, window_tokens=16)
    answered = []
    score = model._score
    model._score = lambda pairs: answered.extend(pairs) or score(pairs)
    return evaluate_tasks(model, ["tiny_choice"], task_directory=directory), len(answered)


def run_ranks(rank, world_size, directory):
    return answer(directory)


@pytest.mark.distributed
def test_two_processes_answer_what_one_does(tmp_path):
    from data_pipeline.tokenizer import train_tokenizer
    from hope_megatron.parallel.distributed import shutdown_distributed

    questions = [
        {"question": f"def function_{i}(", "choices": ["argument", f"value={i}"], "label": i % 2} for i in range(9)
    ]
    (tmp_path / "tiny.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "tiny.yaml").write_text(TASK.format(file=tmp_path / "tiny.jsonl"))
    train_tokenizer(LINES, tmp_path / "tokenizer.model", 300)
    expected, answered = answer(str(tmp_path))
    shutdown_distributed()
    assert answered == 18
    (first, count), (second, other_count) = run_distributed(run_ranks, 2, str(tmp_path), timeout_s=200)
    assert second is None and 8 <= count < 18 and 8 <= other_count < 18
    assert first["tasks"] == expected["tasks"]
