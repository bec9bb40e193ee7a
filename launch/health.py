"""The check of the nodes before training: runs launch/node_check.py on them, and names the bad ones.

First every node looks at itself: devices and scratch disk. Then neighbours in a ring check the network in pairs, each pair
a world of its own, so that one bad node does not hang everybody: result and bandwidth of an all-reduce, and the difference
of their clocks. A node is bad if it does not answer, if its own check fails, or if none of its pairs works. Standard library
only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hope_megatron.runtime.files import write_json, write_text
from launch.step import Step, srun_command
from launch.submission import LaunchDirectory, Submission

Pair = tuple[str, ...]
"""Two neighbours; a node alone, if the job has only one."""


def check_nodes(
    submission: Submission, nodes: Sequence[str], directory: LaunchDirectory, interrupted: Callable[[], bool]
) -> dict[str, str]:
    """Check the nodes of a job; returns the problem of each bad node. Measurements go to health.json.

    Args:
        interrupted: whether the job has been asked to stop; the check then ends early and names no node for its silence.
    """
    health = submission.health
    assert health is not None
    folder = directory.path / "health"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def run(stage: str, number: int, paired: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        results = folder / f"{stage}-{number}"
        results.mkdir()
        command = srun_command(submission, nodes, tasks_per_node=submission.ranks_per_node)
        command += [
            "--kill-on-bad-exit=0",
            *submission.prefix,
            submission.python,
            "-m",
            "launch.node_check",
            stage,
            str(results),
        ]
        options = {
            "gpus": submission.gpus_per_node,
            "scratch": submission.scratch,
            "ports": submission.master_ports,
            "pairs": paired,
            **health,
        }
        write_json(results / "options.json", options)
        step = Step(command, {}, Path(submission.code))
        step.wait(health["timeout_s"], interrupted)
        return _read_reports(results, nodes)

    reports = {"local-0": run("local", 0, [])}
    problems = judge_local(reports["local-0"], submission.ranks_per_node)
    failed: dict[Pair, str] = {}
    checked: list[Pair] = []
    if not problems:
        ports = {node: reports["local-0"][node][0]["port"] for node in nodes}
        for number, paired in enumerate(rounds(nodes)):
            meeting = [{"nodes": pair, "port": ports[pair[0]]} for pair in paired]
            reports[f"pair-{number}"] = answers = run("pair", number, meeting)
            checked += paired
            failed |= judge_pairs(paired, answers, submission.ranks_per_node, health)
        problems = blame(checked, failed)
    write_text(
        directory.health, json.dumps({"nodes": list(nodes), "problems": problems, "reports": reports}, indent=1) + "\n"
    )
    return {} if interrupted() else problems


def rounds(nodes: Sequence[str]) -> list[list[Pair]]:
    """Neighbours of a ring of nodes in two or three rounds, so that every node has at most one partner at a time.

    Each of three or more nodes is in two pairs, with different partners.
    """
    count = len(nodes)
    if count == 1:
        return [[(nodes[0],)]]
    ring: list[Pair] = [(nodes[i], nodes[(i + 1) % count]) for i in range(count if count > 2 else 1)]
    even = [ring[i] for i in range(0, count - 1, 2)]
    odd = [ring[i] for i in range(1, len(ring) - (count % 2), 2)]
    last = [ring[-1]] if count > 2 and count % 2 else []
    return [paired for paired in (even, odd, last) if paired]


def judge_local(reports: dict[str, list[dict[str, Any]]], ranks_per_node: int) -> dict[str, str]:
    """Problems of nodes by their own account, or by their silence."""
    problems = {}
    for node, answers in reports.items():
        found = [problem for answer in answers for problem in answer["problems"]]
        if len(answers) < ranks_per_node:
            found.append(f"{ranks_per_node - len(answers)} of {ranks_per_node} ranks did not answer")
        if found:
            problems[node] = ", ".join(dict.fromkeys(found))
    return problems


def judge_pairs(
    pairs: Sequence[Pair], reports: dict[str, list[dict[str, Any]]], ranks_per_node: int, health: dict[str, Any]
) -> dict[Pair, str]:
    """Pairs that failed, and how."""
    failed = {}
    for pair in pairs:
        answers = [answer for node in pair for answer in reports.get(node, [])]
        found = [problem for answer in answers for problem in answer["problems"]]
        if len(answers) < len(pair) * ranks_per_node and not found:
            found.append("the all-reduce did not end")
        clocks = [answer["time"] for answer in answers if "time" in answer]
        if clocks and max(clocks) - min(clocks) > health["max_clock_skew_s"]:
            found.append(f"clocks differ by {max(clocks) - min(clocks):.1f} s")
        if found:
            failed[pair] = found[0]
    return failed


def blame(pairs: Sequence[Pair], failed: dict[Pair, str]) -> dict[str, str]:
    """The nodes behind failed pairs: those without any pair that works.

    Of two nodes that only have each other, both are named: nothing tells them apart.
    """
    healthy = {node for pair in pairs if pair not in failed for node in pair}
    suspects = [node for node in dict.fromkeys(node for pair in failed for node in pair) if node not in healthy]
    if not suspects:  # every node works with somebody: the link between two of them is bad
        suspects = [pair[-1] for pair in failed]
    return {
        node: next(f"{' with '.join(pair)}: {what}" for pair, what in failed.items() if node in pair)
        for node in suspects
    }


def _read_reports(folder: Path, nodes: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    reports: dict[str, list[dict[str, Any]]] = {node: [] for node in nodes}
    for path in sorted(folder.glob("rank-*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        reports[report["node"]].append(report)
    return reports
