"""The README.md of an exported model: what it is, how it was trained, how the export was checked."""

from __future__ import annotations

from typing import Any

from hope_megatron.checkpoint.find import CheckpointSource
from hope_megatron.config import RunConfig
from hope_megatron.config.changes import describe_changes, settings_changes
from hope_megatron.convert.huggingface.check import ExportCheck

_NOT_TRAINING = ("name", "output_dir", "checkpoint.", "tracking.", "training.log_every", "training.memory_every")
"""Settings that do not touch the weights."""
_TEMPLATE = """\
---
tags:
- hope
- nested-learning
pipeline_tag: text-generation
---

# {name}

A HOPE language model (self-modifying memories and a continuum memory system, from "Nested Learning",
[arXiv 2512.24695](https://arxiv.org/abs/2512.24695)) with {num_parameters:,} parameters, trained with hope_megatron.

## Training

{facts}

## Use

In plain transformers; the recurrent state is the cache, so `generate()` needs constant memory:

    model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)

The tokenizer puts no mark before a text. In training the end mark stands before every document: put `tokenizer.eos_token_id` first
to begin as there.

With hope_megatron:

    hope generate {name} --prompt "..."
    hope eval {name} --text FILE

`model*.safetensors` holds the weights in float32, `config.json` the architecture. {tokenizer}
`chat_template.jinja` writes the messages of a chat as plain text, because the model was trained on no other.

## Check

The files were read back into a fresh model. {check}.
"""


def model_card(source: CheckpointSource, name: str, num_parameters: int, check: ExportCheck, tokenizer: str) -> str:
    """Markdown with the facts of the run that trained the model.

    Args:
        tokenizer: a sentence about its files.
    """
    description = source.checkpoint.description
    rows = {"run": source.config.name} | _facts(source.config, description) | _changes(description)
    if source.averaged:
        rows["weights"] = f"exponential average over steps, decay {source.config.training.ema:g}"
    facts = "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
    text = str(check)
    return _TEMPLATE.format(
        name=name, num_parameters=num_parameters, facts=facts, check=text[0].upper() + text[1:], tokenizer=tokenizer
    )


def _changes(description: dict[str, Any]) -> dict[str, str]:
    """Settings that differed in earlier steps, a row for each start that changed some."""
    rows = {}
    for step, changes in settings_changes(description.get("history", ())):
        shown = {key: values for key, values in changes.items() if not key.startswith(_NOT_TRAINING)}
        if shown:
            rows[f"changed after step {step:,}"] = describe_changes(shown)
    return rows


def _facts(config: RunConfig, description: dict[str, Any]) -> dict[str, Any]:
    model, optim, training = config.model, config.optim, config.training
    progress, layout, origin = description["progress"], description["layout"], description["provenance"]
    matrices = f"{optim.name}, peak learning rate {optim.lr:g}"
    return {
        "steps": f"{progress['step']:,}",
        "tokens": f"{progress['tokens']:,}",
        "sequence length": training.seq_length,
        "batch": f"{training.tokens_per_step:,} tokens",
        "layers, width, heads": f"{model.num_layers}, {model.hidden_size}, {model.num_heads}",
        "vocabulary": f"{model.vocab_size:,}",
        "optimizer": matrices if optim.name == "adamw" else f"{matrices}; AdamW for vectors and embeddings",
        "schedule": f"{optim.schedule}, {optim.warmup_steps} steps of warm-up",
        "precision": training.precision,
        "processes": f"{layout['world_size']}, tensor parallel {layout['tensor_parallel']}",
        "ZeRO stage": config.parallel.zero_stage,
        "commit": origin["commit"] or "unknown",
        "versions": ", ".join(f"{name} {version}" for name, version in origin["versions"].items() if version),
    }
