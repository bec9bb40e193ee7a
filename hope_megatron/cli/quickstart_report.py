"""The quickstart's report: report.json for programs, report.md for people, two charts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hope_megatron.config import RunConfig
    from hope_megatron.convert.huggingface.export import Export


def build_report(
    config: RunConfig, facts: dict[str, Any], seconds: dict[str, float], export: Export, samples: list[str]
) -> dict[str, Any]:
    """Everything that is quoted, flat; `summary.json` of the run is where training's own numbers come from."""
    summary = json.loads((config.run_dir / "summary.json").read_text(encoding="utf-8"))
    scores = facts["evaluation"]["scores"]
    parallel = config.parallel
    return {
        "parameters": export.num_parameters,
        "world_size": summary["world_size"],
        "tp": parallel.tensor_parallel,
        "sequence_parallel": parallel.sequence_parallel,
        "zero_stage": parallel.zero_stage,
        "optimizer": config.optim.name,
        "tokens_seen": summary["tokens"],
        "tokens_per_second": summary["tokens_per_s"],
        "newton_schulz_calls": summary["newton_schulz_calls"],
        "heldout_loss": scores["model"]["loss"],
        "unigram_loss": scores["unigram"]["loss"],
        "bigram_loss": scores["bigram"]["loss"],
        "export_logit_difference": export.check.max_difference,
        "seconds": seconds,
        **facts,
        "samples": samples,
    }


def write_report(directory: Path, config: RunConfig, report: dict[str, Any]) -> None:
    """Write report.json, report.md, losses.png and curves.png."""
    from hope_megatron.eval.report import plot_losses
    from hope_megatron.runtime.files import write_json, write_text
    from hope_megatron.training.plots import plot_curves

    losses = {"unigram": report["unigram_loss"], "bigram": report["bigram_loss"], "HOPE": report["heldout_loss"]}
    plot_losses(
        directory / "losses.png", losses, f"HOPE, {report['parameters'] / 1e6:.1f} M parameters, beside count models"
    )
    references = {name: losses[name] for name in ("unigram", "bigram")}
    plot_curves(config.run_dir / "metrics.jsonl", directory / "curves.png", title="quickstart", references=references)
    write_text(directory / "report.md", _markdown(report))
    write_json(directory / "report.json", report)


def _markdown(report: dict[str, Any]) -> str:
    from hope_megatron.eval.report import markdown_table, score_table

    parts = [
        "# Quickstart",
        f"A HOPE of {report['parameters']:,} parameters, pretrained on {report['tokens_seen']:,} tokens in "
        f"{report['seconds']['pretraining']:.0f} seconds.",
        "## Held-out loss",
        score_table(report["evaluation"]["scores"]),
        f"On {report['evaluation']['tokens']:,} tokens of held-out documents. Unigram and bigram (interpolated modified "
        "Kneser-Ney) were counted on all training tokens.",
        "![losses](losses.png)",
        "![curves](curves.png)",
        "## How it was made",
        markdown_table(["", ""], [[name.replace("_", " "), report[name]] for name in _QUOTED]),
        "## Time",
        markdown_table(["phase", "seconds"], [[name, f"{value:.1f}"] for name, value in report["seconds"].items()]),
        "## Samples from the exported model",
        *(f"```\n{sample.rstrip()}\n```" for sample in report["samples"]),
    ]
    return "\n\n".join(parts) + "\n"


_QUOTED = (
    "corpus_files", "corpus_bytes", "world_size", "tp", "sequence_parallel", "zero_stage", "optimizer", "tokens_seen",
    "tokens_per_second", "newton_schulz_calls", "export_logit_difference",
)  # fmt: skip
