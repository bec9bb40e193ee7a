"""Every family of the paper's tables that there is here, side by side: on text, on recall and on formal languages."""

from __future__ import annotations

from hope_megatron.suites.ablations import text_task
from hope_megatron.suites.families import family_suite
from hope_megatron.suites.languages import language_tasks
from hope_megatron.suites.models import LIKE
from hope_megatron.suites.recall import associative_recall
from hope_megatron.suites.suite import Suite, SuiteOptions

TABLE_FAMILIES = (
    "hope", "hope_w1", "hope_attention", "transformer_pp", "samba", "linear_attention", "retnet", "deltanet",
    "gated_deltanet", "comba", "rwkv7", "dla", "ttt_linear", "ttt_mlp", "moneta", "yaad", "memora", "titans",
    "armt",
)  # fmt: skip
_TEXT = "text"
_LANGUAGES = ("parity", "a^n b^n")
"""One that wants counting modulo a number, and one that wants counting without bound."""


def build(options: SuiteOptions) -> Suite:
    """All families at equal parameters and tokens."""
    longest = max(options.lengths or (20 if options.quick else 24,))
    languages = [task for task in language_tasks(longest) if task.name in _LANGUAGES]
    tasks = [
        text_task(64 if options.quick else 256),
        associative_recall(4 if options.quick else 8),
        *languages,
    ]
    return family_suite(
        "families",
        "Every family on text, recall and languages",
        tasks,
        options,
        chunk_tokens=16,
        token_by_token=tuple(task.name for task in languages),
        families=TABLE_FAMILIES,
        steps=150 if options.quick else 800,
        starts=("own", "forgetting"),
        quantity="text: nats per byte (lower is better); the others: share that is right (higher is better)",
        losses=(_TEXT,),
        notes="Languages are read and written token by token. ARMT has segments of 16 tokens with 4 memory tokens. "
        + "; ".join(LIKE[name] for name in sorted(LIKE))
        + ".",
    )
