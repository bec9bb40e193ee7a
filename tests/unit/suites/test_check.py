"""A record repeats: the same bits here, within the spread elsewhere, and a changed figure is found."""

from __future__ import annotations

import json
import re

import pytest

from hope_megatron.cli.main import main
from hope_megatron.suites.check import Comparison
from hope_megatron.suites.suite import Cell


def test_a_record_repeats_and_a_changed_figure_does_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # torch is there already
    record = tmp_path / "permutations.json"
    arguments = ["permutations", "--quick", "--families", "retnet", "--tasks", "S3", "--seeds", "2", "--steps", "4"]
    assert main(["eval", "suite", *arguments, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "permutations-steps.png").read_bytes().startswith(b"\x89PNG")
    assert main(["eval", "suite", "check", str(record), "--cells", "2", "--json", str(tmp_path / "c.json")]) == 0
    assert "12 figures: 12 with the same bits, 0 outside" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "c.json").read_text())["figures"]) == 12

    text = record.read_text()
    claimed = re.sub(r'"raw": \{"2-8": [\d.]+', '"raw": {"2-8": 0.987', text)
    assert claimed != text
    record.write_text(claimed)
    assert main(["eval", "suite", "check", str(record), "--cells", "1"]) == 1
    assert "1 outside the spread" in capsys.readouterr().out

    record.write_text(text.replace('"width": 16', '"width": 17'))
    assert main(["eval", "suite", "check", str(record)]) == 2
    assert "made with other settings (width)" in capsys.readouterr().err
    record.write_text("{}")
    assert main(["eval", "suite", "check", str(record)]) == 2
    assert "expected format 2" in capsys.readouterr().err
    assert main(["eval", "suite", "check"]) == 2
    assert "name a record" in capsys.readouterr().err


@pytest.mark.parametrize(
    "found, verdict", [(0.5, "same bits"), (0.52, "inside the spread"), (0.7, "outside the spread")]
)
def test_verdicts(found, verdict):
    assert Comparison(Cell("t", "a", 0), "raw", "b", 0.5, found, 0.4, 0.6).verdict == verdict
