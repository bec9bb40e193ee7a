"""What an array or a chain would submit: the scripts and every check that can be made before, and nothing written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from launch.chain import ChainConfig
from launch.cluster import ClusterConfig
from launch.jobs import describe, dry_run, load_config
from launch.preflight import Check, preflight
from launch.script import array_script, command_script


class Shown(NamedTuple):
    """One job as it would be."""

    title: str
    script: str
    checks: list[Check]

    def __str__(self) -> str:
        checks = "".join(f"{check}\n" for check in self.checks) or "  none before it runs\n"
        return f"# ---- {self.title}\n{self.script}\n# checks\n{checks}"


def dry_run_array(
    config: str,
    cells: Sequence[tuple[str, ...]],
    cluster: ClusterConfig,
    nodes: int,
    *,
    overrides: Iterable[str],
    limit: int,
) -> list[Shown]:
    """The script that all cells share, with the checks of each."""
    overrides = list(overrides)
    base = load_config(config, overrides)
    array_dir, code = base.run_dir, base.run_dir / "launch" / "code" / "DIGEST"
    checks = []
    for cell in cells:
        for check in preflight(load_config(config, [*overrides, *cell]), cluster, nodes):
            checks.append(check._replace(name=f"{' '.join(cell)}: {check.name}"))
    submission = replace(describe(base, cluster, nodes, code), name=base.name)
    script = array_script(cluster, submission, array_dir, len(cells), limit)
    return [Shown(f"{base.name}: {len(cells)} runs, {limit} at a time", script, checks)]


def dry_run_chain(chain: ChainConfig, cluster: ClusterConfig) -> list[Shown]:
    """Each link, in order. Data that an earlier link may make are not looked for."""
    directory = (chain.output_dir / chain.name).expanduser().absolute()
    shown = []
    for number, link in enumerate(chain.links):
        after = f", after {chain.links[number - 1].name}" if number else ""
        name = f"{chain.name}-{link.name}"
        if link.config is not None:
            rendered = dry_run(load_config(link.config, link.overrides), cluster, link.nodes, data_exists=not number)
            shown.append(Shown(f"{name}{after}", rendered.script, rendered.checks))
            continue
        assert link.run is not None
        places = {"code": directory / "code" / "DIGEST", "work_dir": Path.cwd(), "log": directory / f"{link.name}.log"}
        script = command_script(cluster, name, link.run, gpus=link.gpus, **places)
        shown.append(Shown(f"{name}{after}", script, []))
    return shown
