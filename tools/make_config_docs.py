"""Write docs/configuration.md from the schema; with --check, only say whether it is up to date."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from hope_megatron.config import RunConfig, Section
from hope_megatron.config.messages import section_in
from launch.explain import explain_keys

TARGET = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

Written by `make docs` from the schema in `hope_megatron/config/`; edit the docstrings there.

A run file is YAML 1.2. `hope train FILE key.sub=value …` changes single values: the text after `=` is YAML, numbers index lists
(`model.cms.levels.0.hidden_size=512`). `0200` is 200, `0o17` is 15 and `0x1F` is 31; `10:00`, `1_000`, `no` and `2026-01-01` are
text. Unknown keys, keys given twice, wrong types and impossible combinations are refused
before any process starts. Layers, later over earlier: model preset, run file, overrides.

`model` is the name of a preset (`model: hope_tiny`), or a section; a section may name a preset and change it:

```yaml
model:
  preset: hope_tiny
  vocab_size: 8192
  memory: {chunk_tokens: 64}
```

On the command line `model=hope_60m` replaces the whole model, `model.preset=hope_60m` keeps the changes. `titans_60m` and the
like are a file of `configs/families` over the HOPE preset of that size. Presets and run files are found by name in
`./configs`, then in the repository's `configs/`, then in the installed package. Paths under `data` are relative to the current
directory. `hope train … --dry-run` prints the resolved configuration; `hope plan` what it costs.

## Leaving parts of HOPE out

The ablations of Nested Learning (arXiv 2512.24695, table 6) are one key each, behind `model.` in a run. What else has to follow
(a rate that would diverge, a term added to a rate that is gone) follows, unless the file says otherwise.

| without | key |
|---|---|
| Delta Gradient Descent | `memory.dgd_layers=none` |
| momentum | `memory.momentum=none` (the default; with it: `data` or `constant`) |
| writing W2 | `memory.written_layers=output` ([what that gains](records/2026-11-26-needles.md#w1-alone-written)) |
| weight decay | `memory.decay=none` |
| CMS | `cms.levels=[{hidden_size: 512}]` (one MLP of the levels' width together) |
| adaptive k, v | `memory.adaptive_key=false`, `memory.adaptive_value=false` |
| adaptive η, α | `memory.adaptive_eta=false`, `memory.adaptive_alpha=false` |
| own targets | `memory.own_targets=false` |

Queries come from a static projection in every setting, so that there is no adaptive q to leave out.

## Starting a run again with other settings

`hope train FILE` goes on from the newest checkpoint of the run. Learning rate, batch, precision, optimizer and number of processes
may differ from before. Every difference is printed; an override that is left off is one. `history.json` in the run directory
keeps them with their steps. Checkpoints carry them (`hope checkpoint inspect`), MLflow shows them as tags (`settings from step 7`),
and the model card of an export lists them.

The model, the sequence length and the data may not change: such a resume is refused, and names the keys. Changed data need
`--data-transition REASON`.

A schedule that decays and is stretched over more steps raises the learning rate again. The start says so, and what to choose
instead. `--dry-run` says all of this beforehand.

## Epochs

`hope plan FILE`, `--dry-run`, the start of a run, its end and `summary.json` say how often the data are read. Up to 4 epochs,
repeated text teaches about as much as new text. Beyond that there is a warning: it says what the tokens are worth by the law of
Muennighoff et al. ([arXiv 2305.16264](https://arxiv.org/abs/2305.16264)).

## Passwords in `tracking.uri`

A user name or password is masked (`http://***@host`) in `config.yaml`, checkpoints, logs, MLflow and on screen. Only the process
knows it. A resume takes it from your run file or override again, from `MLFLOW_TRACKING_URI`, or from MLflow's own
`MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`. Cells of a sweep and Slurm jobs get it through their environment.
"""


def document() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *_sections(RunConfig, ()), *_cluster_files()])


def _cluster_files() -> Iterator[str]:
    yield "## Cluster files\n"
    yield "The keys of a file in `configs/clusters` ([launch](launch.md)). `hope launch --explain` prints them too.\n"
    yield "| key | default | meaning |\n|---|---|---|"
    for key, default, meaning in explain_keys():
        shown = default if default in ("required", "a section") else f"`{default}`"
        yield f"| `{key}` | {shown} | {_escaped(meaning)} |"
    yield ""


def _sections(section: type[Section], path: tuple[str, ...]) -> Iterator[str]:
    """A table of the section's own keys, then its sub-sections."""
    heading = f"`{'.'.join(path)}`" if path else "The run"
    yield f"{'#' * min(2 + max(len(path) - 1, 0), 4)} {heading}\n\n{inspect.getdoc(section)}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    inner: list[tuple[type[Section], tuple[str, ...]]] = []
    for name, field in section.model_fields.items():
        found = section_in(field.annotation)
        if found is not None:
            item = (name,) if found is field.annotation else (name, "N")
            inner.append((found, (*path, *item)))
        yield f"| `{name}` | {_type(field, found)} | {_default(field, found)} | {_meaning(field, found)} |"
    yield ""
    for found, where in inner:
        yield from _sections(found, where)


def _type(field: FieldInfo, section: type[Section] | None) -> str:
    if section is not None:
        return "section" if section is field.annotation else "list of sections"
    text = field.annotation.__name__ if isinstance(field.annotation, type) else str(field.annotation)
    text = re.sub(r"typing\.|pathlib\.(_local\.)?|, \.\.\.", "", text)
    text = re.sub(r"Annotated\[([^,]*), \w+\([^)]*\)\]", r"\1", text)  # how a value is validated is no type
    text = re.sub(r"Optional\[(.*)\]", r"\1 | None", text)
    text = re.sub(r"Literal\[([^]]*)\]", lambda match: match[1].replace("'", ""), text)
    text = text.replace("Path", "path").replace("str", "text").replace("tuple", "list").replace("None", "null")
    bounds = [
        f"{sign} {limit}"
        for rule in field.metadata
        for name, sign in _BOUNDS
        if (limit := getattr(rule, name, None)) is not None
    ]
    return " ".join([text.replace("|", "\\|"), *bounds])


_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


def _default(field: FieldInfo, section: type[Section] | None) -> str:
    if field.default is PydanticUndefined:
        return "required"
    return "" if section is not None else f"`{_yaml(field.default)}`"


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(_yaml, value))}]" if isinstance(value, tuple) else str(value)


def _meaning(field: FieldInfo, section: type[Section] | None) -> str:
    text = field.description or ("see below" if section is not None else "")
    return _escaped(" ".join(text.split()))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Write the page, or with --check compare it."""
    text = document()
    if arguments == ["--check"]:
        if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text:
            return 0
        print(f"{TARGET} is not what the schema says; run `make docs`", file=sys.stderr)
        return 1
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
