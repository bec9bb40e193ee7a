"""Jobs that follow each other: prepare data, train, convert, evaluate. A link that fails cancels what follows.

A chain file lists the links in order; each starts when the one before it has succeeded (Slurm's afterok):

    name: tiny
    output_dir: runs
    links:
      - {name: data, run: [data, prepare, texts/, --out, data/tiny]}
      - {name: train, config: configs/runs/tiny.yaml, nodes: 2}
      - {name: convert, run: [convert, runs/tiny, --out, runs/tiny/hf]}

A link is a training run (`config`, supervised as any other) or one `hope` command (`run`). Paths are relative to the
directory in which `hope launch chain` is called. Logs, scripts and the record of the chain lie in output_dir/NAME.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError, model_validator

from hope_megatron.config import ConfigError, Section
from hope_megatron.config.load import read_mapping
from hope_megatron.config.messages import explain
from hope_megatron.runtime.files import write_json, write_text
from hope_megatron.runtime.records import read_object
from launch import slurm
from launch.attempts import is_finished
from launch.cluster import ClusterConfig
from launch.errors import LaunchError
from launch.freeze import freeze_code
from launch.jobs import load_config, submit_run
from launch.script import command_script, write_secrets
from launch.submission import LaunchDirectory

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]

_AFTER = "--dependency=afterok:{}"
_OR_CANCEL = "--kill-on-invalid-dep=yes"


class LinkConfig(Section):
    """One job of a chain."""

    name: Name
    """Name within the chain."""
    config: str | None = None
    """Run file of a training run."""
    overrides: tuple[str, ...] = ()
    """Changes to the run file."""
    nodes: int = Field(default=1, gt=0)
    """Nodes of a training run."""
    run: tuple[str, ...] | None = None
    """Command line of one `hope` command, without `hope`."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of a command."""

    @model_validator(mode="after")
    def _check(self) -> LinkConfig:
        if (self.config is None) == (not self.run):
            raise ConfigError(f"link {self.name}: give either config (a training run) or run (a command)")
        return self


class ChainConfig(Section):
    """A chain file."""

    name: Name
    """Name of the chain and of its directory."""
    output_dir: Path = Field(default=Path("runs"), validate_default=False)
    """The chain's scripts and logs lie in output_dir/name."""
    links: tuple[LinkConfig, ...] = Field(min_length=1)
    """Jobs, in order."""

    @model_validator(mode="after")
    def _check(self) -> ChainConfig:
        names = [link.name for link in self.links]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"chain {self.name}: two links are named {name}; rename one")
        return self


@dataclass(frozen=True)
class Link:
    """A link that was submitted."""

    name: str
    job_id: str
    log: str
    run_dir: str | None
    """Of a training run."""
    steps: int = 0


def load_chain(path: Path) -> ChainConfig:
    """Read a chain file.

    Raises:
        ConfigError: one line per mistake.
    """
    data = read_mapping(path)
    try:
        return ChainConfig.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise explain(error, ChainConfig, lambda location: str(path)) from None


def submit_chain(
    chain: ChainConfig, cluster: ClusterConfig, *, report: Callable[[str], None] = print
) -> tuple[Path, list[Link]]:
    """Queue all links; returns the chain's directory and its links. If one is refused, those before it are cancelled.

    Raises:
        LaunchError: if the chain's directory exists, or a training run does not pass the checks.
        SlurmError: if Slurm refuses a link.
    """
    slurm.require_slurm()
    directory = (chain.output_dir / chain.name).expanduser().absolute()
    if directory.exists():
        raise LaunchError(f"{directory} exists already; give the chain another name")
    directory.mkdir(parents=True)
    links: list[Link] = []
    try:
        for link in chain.links:
            options = (_AFTER.format(links[-1].job_id), _OR_CANCEL) if links else ()
            links.append(_submit(link, f"{chain.name}-{link.name}", cluster, directory, options, report))
            report(f"{link.name}: job {links[-1].job_id}" + (f", after {links[-2].name}" if len(links) > 1 else ""))
    except Exception:
        for submitted in links:
            slurm.cancel(submitted.job_id)
        shutil.rmtree(directory)  # it was not there before
        raise
    record = {"name": chain.name, "links": [vars(link) for link in links]}
    write_json(directory / "chain.json", record)
    return directory, links


def _submit(
    link: LinkConfig,
    job_name: str,
    cluster: ClusterConfig,
    directory: Path,
    options: tuple[str, ...],
    report: Callable[[str], None],
) -> Link:
    if link.config is not None:
        config = load_config(link.config, link.overrides)
        # A link before this one may be what makes the data.
        submission = submit_run(config, cluster, link.nodes, options=options, data_exists=not options, report=report)
        log = LaunchDirectory(config.run_dir).log
        return Link(link.name, str(submission.job_id), str(log), str(config.run_dir), config.training.steps)
    assert link.run is not None
    log, script = directory / f"{link.name}.log", directory / f"{link.name}.sbatch"
    code = freeze_code(directory / "code")
    write_secrets(cluster, directory)
    text = command_script(cluster, job_name, link.run, code=code, work_dir=Path.cwd(), log=log, gpus=link.gpus)
    write_text(script, text)
    return Link(link.name, slurm.submit(script, options), str(log), None)


@dataclass(frozen=True)
class LinkStatus:
    """A link of a chain at this moment."""

    name: str
    state: str
    because: str
    """Whose failure cancelled it, or empty."""
    job_id: str
    log: str

    def __str__(self) -> str:
        reason = f", because {self.because} failed" if self.because else ""
        return f"  {self.name}: {self.state}{reason}, job {self.job_id}, log {self.log}"


def chain_status(directory: Path) -> list[LinkStatus]:
    """Each link: its state, and why the rest was cancelled.

    Raises:
        LaunchError: if the directory is not that of a chain.
    """
    record = read_object(directory / "chain.json") or {}
    try:
        links = [Link(**values) for values in record["links"]]
    except (KeyError, TypeError):
        raise LaunchError(
            f"{directory} is not the directory of a chain: chain.json is missing or damaged; ask for its runs one by one"
        ) from None
    found: list[LinkStatus] = []
    failed = ""
    for link in links:
        state = _link_state(link)
        because = failed if state == "cancelled" else ""
        if not failed and state in ("failed", "cancelled", "timeout", "node_fail", "out_of_memory"):
            failed = link.name
        found.append(LinkStatus(link.name, state, because, link.job_id, link.log))
    return found


def _link_state(link: Link) -> str:
    if link.run_dir is not None and is_finished(Path(link.run_dir), link.steps):
        return "completed"
    job = slurm.find_job(link.job_id)
    if job is None or job.log != link.log:
        return "ended (Slurm has forgotten how; see the log)"
    return job.state.lower()
