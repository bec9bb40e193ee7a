"""From a configuration to a batch script: frozen code, checks that find what is wrong, cells and chains."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hope_megatron.cli.main import main
from hope_megatron.config import ConfigError
from launch.arrays import grid
from launch.attempts import History
from launch.chain import load_chain
from launch.cluster import ClusterConfig, ContainerConfig
from launch.errors import LaunchError
from launch.freeze import freeze_code
from launch.jobs import describe, load_config, write_files
from launch.preflight import preflight
from launch.script import array_script, command_script, train_script
from launch.status import run_status
from launch.submission import LaunchDirectory, read_submission

GPU = ClusterConfig(partition="gpu", gpus_per_node=8, hardware="h100", cpus_per_process=4, setup=("module load cuda",))
RUN = """
name: demo
model: hope_760m
training: {steps: 100, seq_length: 4096, global_batch_size: 64, recompute: layer}
data: {train: data/train, tokenizer: data/tokenizer.model}
optim: {warmup_steps: 10}
"""


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with (fake) data beside it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "tokenizer.model").write_bytes(b"tokenizer")
    (tmp_path / "data" / "train" / "000.tar").write_bytes(b"0" * 100)
    manifest = {
        "shards": [{"name": "000.tar", "bytes": 100}],
        "vocab_size": 32000,
        "tokens": 10,
        "tokenizer_sha256": hashlib.sha256(b"tokenizer").hexdigest(),
    }
    (tmp_path / "data" / "train" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path / "run.yaml"


def failed(config_file: Path, cluster: ClusterConfig = GPU, nodes: int = 2, *overrides: str) -> dict[str, str]:
    checks = preflight(load_config(str(config_file), overrides), cluster, nodes)
    return {check.name: check.detail for check in checks if not check.ok}


def test_a_good_run_passes(run_file: Path) -> None:
    assert failed(run_file) == {}


@pytest.mark.parametrize(
    ("nodes", "overrides", "check", "words"),
    [
        (3, [], "ranks", "global_batch_size=64"),
        (2, ["parallel.tensor_parallel=16", "model.num_heads=16"], "ranks", "cross nodes"),
        (2, ["training.micro_batch_size=4", "training.recompute=none"], "memory", "micro_batch_size"),
        (2, ["output_dir=/proc/none"], "run directory", "3 checkpoints"),
        (2, ["data.tokenizer=data/none.model"], "tokenizer", "cannot be read"),
        (2, ["data.train=data/none"], "data.train", "hope data prepare"),
        (2, ["model.vocab_size=31000"], "data.train", "vocabulary"),
    ],
)
def test_preflight_finds(run_file: Path, nodes: int, overrides: list[str], check: str, words: str) -> None:
    problems = failed(run_file, GPU, nodes, *overrides)
    assert words in problems[check], problems


def test_preflight_finds_damaged_and_foreign_data(run_file: Path) -> None:
    shard = run_file.parent / "data" / "train" / "000.tar"
    shard.write_bytes(b"0" * 99)
    assert "has 99 bytes, its manifest says 100" in failed(run_file)["data.train"]
    shard.write_bytes(b"0" * 100)
    (run_file.parent / "data" / "tokenizer.model").write_bytes(b"another")
    assert "another tokenizer" in failed(run_file)["data.train"]
    (run_file.parent / "data" / "train" / "manifest.json").write_text("[]")
    assert "not a manifest" in failed(run_file)["data.train"]


def bash_accepts(script: str) -> bool:
    return subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_the_script_says_what_the_cluster_file_says(run_file: Path) -> None:
    config = load_config(str(run_file), [])
    directory = LaunchDirectory(config.run_dir)
    script = train_script(GPU, describe(config, GPU, 2, Path("/code")), directory)
    assert bash_accepts(script)
    for line in (
        "#SBATCH --partition=gpu",
        "#SBATCH --nodes=2",
        "#SBATCH --gres=gpu:8",
        "#SBATCH --signal=B:USR1@300",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={directory.log}",
        "module load cuda",
        f"exec python -m launch.supervisor {config.run_dir}",
    ):
        assert line in script.splitlines()
    assert "@{" not in script


def test_names_with_spaces_and_dollars_stay_words(run_file: Path) -> None:
    config = load_config(str(run_file), ["output_dir=/tmp/a $(touch b) 'c'"])
    script = train_script(GPU, describe(config, GPU, 1, Path("/co de")), LaunchDirectory(config.run_dir))
    assert bash_accepts(script)
    words = subprocess.run(
        [
            "bash",
            "-c",
            script.replace("exec python -m launch.supervisor", "printf %s")
            .replace("cd ", "true ")
            .replace("module load", "true"),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert words == str(config.run_dir)


def test_arrays_and_commands_render(run_file: Path) -> None:
    config = load_config(str(run_file), [])
    submission = describe(config, GPU, 1, Path("/code"))
    array = array_script(GPU, submission, Path("/runs/array"), 10, 3)
    assert bash_accepts(array)
    assert "#SBATCH --array=0-9%3" in array
    assert '/runs/array/cells/"$SLURM_ARRAY_TASK_ID"' in array
    contained = GPU.model_copy(update={"container": ContainerConfig(image="image.sqsh", mounts=("/a:/b",))})
    command = command_script(
        contained,
        "chain-eval",
        ["eval", "a b"],
        code=Path("/code"),
        work_dir=Path("/home/me"),
        log=Path("/l.log"),
        gpus=1,
    )
    assert bash_accepts(command)
    assert "#SBATCH --gres=gpu:1" in command
    assert "--container-image=image.sqsh --container-mounts=/home/me:/home/me,/code:/code,/a:/b" in command
    assert command.rstrip().endswith("-m launch.command /home/me eval 'a b'")


def test_frozen_code_is_what_it_was(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    (root / "hope_megatron").mkdir(parents=True)
    (root / "hope_megatron" / "__init__.py").write_text("x = 1\n")
    (root / "hope_megatron" / "__pycache__").mkdir()
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    first = freeze_code(tmp_path / "code", root)
    assert freeze_code(tmp_path / "code", root) == first, "the same code is copied once"
    (root / "hope_megatron" / "__init__.py").write_text("x = 2\n")
    second = freeze_code(tmp_path / "code", root)
    assert (first / "hope_megatron" / "__init__.py").read_text() == "x = 1\n"
    assert second != first
    assert not (first / "hope_megatron" / "__pycache__").exists()
    source = json.loads((second / "source.json").read_text())
    assert len(source["commit"]) == 40 and source["uncommitted"] == ["hope_megatron/__init__.py"]
    assert "+x = 2" in (second / "changes.patch").read_text()
    shutil.rmtree(root / ".git")
    (root / "hope_megatron" / "__init__.py").write_text("x = 3\n")
    assert json.loads((freeze_code(tmp_path / "code", root) / "source.json").read_text())["commit"] is None


def test_the_frozen_code_runs_the_command_in_the_users_directory(tmp_path: Path) -> None:
    code = freeze_code(tmp_path / "code")
    environment = {"PYTHONPATH": str(code), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-m", "launch.command", str(tmp_path), "--version"],
        cwd=code,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("hope_megatron "), done.stderr


def test_the_supervisor_needs_the_standard_library_only() -> None:
    probe = (
        "import sys, launch.supervisor; print([m for m in sys.modules if m in ('torch', 'pydantic', 'yaml', 'numpy') "
        "or m.startswith('hope_megatron.') and not m.startswith('hope_megatron.runtime')])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_grids_are_products() -> None:
    assert grid(["a=1,2", "b=x"]) == [("a=1", "b=x"), ("a=2", "b=x")]
    for axes in (["a"], ["a="], ["a=1,"], ["=1"], ["a=1", "a=2"]):
        with pytest.raises(ConfigError):
            grid(axes)


@pytest.mark.parametrize(
    ("links", "words"),
    [
        ("[{name: a}]", "either config"),
        ("[{name: a, run: [data], config: x.yaml}]", "either config"),
        ("[{name: a, run: [data]}, {name: a, run: [eval]}]", "two links are named a"),
        ("[]", "at least 1"),
        ("[{name: a, runn: [data]}]", "runn"),
    ],
)
def test_mistakes_in_a_chain_are_named(tmp_path: Path, links: str, words: str) -> None:
    (tmp_path / "chain.yaml").write_text(f"name: c\nlinks: {links}\n")
    with pytest.raises(ConfigError, match=words):
        load_chain(tmp_path / "chain.yaml")


def test_submission_reads_back(run_file: Path) -> None:
    config = load_config(str(run_file), [])
    directory = LaunchDirectory(config.run_dir)
    submission = describe(config, GPU, 2, Path("/code"))
    write_files(config, GPU, submission, directory)
    assert read_submission(config.run_dir) == submission
    assert load_config(str(directory.config), []) == config
    with pytest.raises(LaunchError, match="hope launch"):
        read_submission(run_file.parent)


def test_status_needs_no_slurm_for_a_finished_run(run_file: Path) -> None:
    config = load_config(str(run_file), [])
    directory = LaunchDirectory(config.run_dir)
    write_files(config, GPU, describe(config, GPU, 2, Path("/code")), directory)
    history = History(directory.attempts)
    for outcome in ("crashed", "finished"):
        history.start("5", 0, ["n1", "n2"], 0)
        history.end(outcome, "", 100, [])
    records = [{"step": step, "train/tokens": 1000 * step, "speed/tokens_per_s": 50.0} for step in (50, 100)]
    (config.run_dir / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records) + '{"step": 1'
    )
    (config.run_dir / "summary.json").write_text(json.dumps({"complete": True, "step": 100}))
    (config.run_dir / "start_up.json").write_text(json.dumps({"step": 1, "phases_s": {"imports": 8.5, "model": 2.0}}))
    status = run_status(config.run_dir)
    assert "start-up    10.5 s: imports 8.5, model 2.0\n" in str(status)
    assert (status.state, status.step, status.steps, status.tokens_per_s) == ("finished", 100, 100, 50.0)
    assert (status.attempts, status.restarts) == (2, 1)


def test_command_line_says_what_is_missing(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for arguments, words in (
        ([str(run_file)], "--cluster"),
        (["status"], "run directory"),
        (["status", "a", "b"], "one argument"),
        (["status", str(run_file.parent)], "hope launch"),
        ([str(run_file), "--cluster", "cpu"], "--local"),
        (["array", str(run_file), "--cluster", "cpu"], "--vary"),
        (["resume", str(run_file.parent), "--dry-run"], "does not take --dry-run"),
        ([str(run_file), "--cluster", "cpu", "--now"], "does not take --now"),
        ([str(run_file), "--cluster", "cpu", "--nodes", "0"], "--nodes 0"),
    ):
        assert main(["launch", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_dry_run_shows_script_and_checks_and_writes_nothing(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    before = sorted(run_file.parent.rglob("*"))
    assert (
        main(["launch", str(run_file), "--cluster", "h100_infiniband", "--nodes", "2", "--dry-run", "optim.lr=1e-3"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "#SBATCH --nodes=2" in shown and "16" in shown and "ok    data.train" in shown
    assert sorted(run_file.parent.rglob("*")) == before


def test_dry_runs_of_arrays_and_chains_write_nothing(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    chain = tmp_path / "chain.yaml"
    links = [{"name": "data", "run": ["data", "verify", "x"]}, {"name": "train", "config": str(run_file)}]
    chain.write_text(json.dumps({"name": "c", "output_dir": str(tmp_path / "chains"), "links": links}))
    before = sorted(tmp_path.rglob("*")), sorted(run_file.parent.rglob("*"))
    array = ["array", str(run_file), "--vary", "optim.lr=1e-3,2e-3"]
    assert main(["launch", *array, "--cluster", "h100_infiniband", "--limit", "1", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "#SBATCH --array=0-1%1" in shown and shown.count("ok    optim.lr=2e-3: memory") == 1
    assert main(["launch", "chain", str(chain), "--cluster", "h100_infiniband", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("# ---- c-data\n") < shown.index("# ---- c-train, after data\n")
    assert "launch.command" in shown and "launch.supervisor" in shown
    assert (sorted(tmp_path.rglob("*")), sorted(run_file.parent.rglob("*"))) == before


def test_preflight_digests_shards(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped byte of equal length; and the odds, where not everything is digested."""
    folder = run_file.parent / "data" / "train"
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [f"{number:03d}.tar" for number in range(8)]
    for name in names:
        (folder / name).write_bytes(b"0" * 100)
    sha256 = hashlib.sha256(b"0" * 100).hexdigest()
    manifest["shards"] = [{"name": name, "bytes": 100, "sha256": sha256} for name in names]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    checks = {check.name: check for check in preflight(load_config(str(run_file), []), GPU, 2)}
    assert "8 digested (" in checks["data.train"].detail
    (folder / "004.tar").write_bytes(b"0" * 50 + b"1" + b"0" * 49)
    assert "004.tar is corrupt" in failed(run_file)["data.train"]
    (folder / "004.tar").write_bytes(b"0" * 100)
    monkeypatch.setattr("launch.preflight._DIGEST_BYTES", 400)
    checks = {check.name: check for check in preflight(load_config(str(run_file), []), GPU, 2)}
    assert "4 digested: one damaged shard shows with a chance of 50%" in checks["data.train"].detail
