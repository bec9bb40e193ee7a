"""Claims that a figure once flattered stand beside what belongs to them."""

from __future__ import annotations

import re
from pathlib import Path

from hope_megatron.config.model import CMSConfig, CMSLevelConfig, MemoryConfig
from hope_megatron.config.optim import OptimConfig

ROOT = Path(__file__).parents[3]


def text(name: str) -> str:
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def test_the_speed_of_the_operator_names_both_comparisons() -> None:
    (sentence,) = (part for part in text("README.md").split("- ") if "titans-pytorch" in part)
    assert "3.3 times" in sentence and "1.04 times its default mode" in sentence


def test_the_cost_of_m3_says_what_slow_levels_add() -> None:
    page = text("docs/records/2026-11-24-optimizer-cost.md")
    assert "1.59" in page and "2.65" in page
    assert "1.6 to 2.7 times the median" in text("docs/records/README.md")


def test_the_default_rate_is_the_one_that_the_records_found_best() -> None:
    assert OptimConfig().name == "m3" and OptimConfig().lr == 8e-3


def test_the_scripts_that_records_name_are_there() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("hope_megatron/**/*.md")]
    named = {
        name for page in pages for name in re.findall(r"benchmarks/[\w/]+\.(?:py|sh)", page.read_text(encoding="utf-8"))
    }
    assert len(named) > 15 and [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_the_map_of_the_paper_names_tests_and_keys_that_are_there() -> None:
    page = (ROOT / "docs/nested_learning.md").read_text(encoding="utf-8")
    tests = set(re.findall(r"`((?:unit|distributed)/[\w/]+(?:\.py|/))`", page))
    assert len(tests) > 12 and [name for name in sorted(tests) if not (ROOT / "tests" / name).exists()] == []
    sections = {"optim": OptimConfig, "memory": MemoryConfig, "cms.levels.N": CMSLevelConfig, "cms": CMSConfig}
    keys = re.findall(r"`(?:model\.)?(optim|memory|cms\.levels\.N|cms)\.(\w+)[=`]", page)
    unknown = [f"{section}.{key}" for section, key in keys if key not in sections[section].model_fields]
    assert len(keys) > 20 and unknown == []
