"""`hope train` on shards in an S3-compatible store behind a bad network: the very losses of the same shards on disk."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -e '.[remote]'")
pytest.importorskip("moto", reason="moto is not installed: pip install -e '.[test]'")

from moto.server import ThreadedMotoServer

from data_pipeline.corpus import ReadOptions
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import train_tokenizer
from hope_megatron.training.metrics import read_metrics

from ..unit.data.stores import FaultyServer, running
from .test_data_in_training import RUN, SCRIPT, VOCAB

CACHE_BYTES = 1 << 18
TIMEOUT_S = 100
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1", "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two sets of some small shards each, and their tokenizer."""
    texts = {"first": Path(json.decoder.__file__).read_text(), "more": Path(os.__file__).read_text()[:20_000]}
    train_tokenizer(texts.values(), tmp_path / "tokenizer.model", VOCAB)
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
        prepare(
            [tmp_path / f"{name}.txt"], tmp_path / "tokenizer.model", tmp_path / name, held_out_fraction=0.0, workers=1,
            shard_tokens=3000, read=ReadOptions(text_unit="chunk", chunk_bytes=500),
        )  # fmt: skip
    return tmp_path


@pytest.fixture
def store(root: Path, monkeypatch: pytest.MonkeyPatch):
    """The same below s3://sets, behind a proxy that can fail."""
    import s3fs

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    try:
        port = moto.get_host_and_port()[1]
        client = s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{port}", skip_instance_cache=True)
        client.mkdirs("sets")
        for path in [root / "tokenizer.model", *root.glob("*/train/*")]:
            client.pipe(f"sets/{path.relative_to(root)}", path.read_bytes())
        with running(FaultyServer(upstream=port)) as server:
            monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
            yield server
    finally:
        moto.stop()


def test_shards_in_a_store_train_as_those_on_disk(root: Path, store: FaultyServer) -> None:
    store.only, store.faults = r"\.(tar|idx)$", ["503", "cut", "reset", "slow", "", "cut"]
    run = root / "run.yaml"
    run.write_text(RUN.format(root=root, vocab=VOCAB))
    remote = [
        "data.train=s3://sets/first/train", "data.mix_with={more: s3://sets/more/train}", "data.on_corrupt=stop",
        "data.tokenizer=s3://sets/tokenizer.model", f"data.cache_gib={CACHE_BYTES / 2**30}", f"data.cache_dir={root}/cache",
    ]  # fmt: skip
    commands = [
        ["train", str(run), "name=local", "--in-process"],
        ["train", str(run), "name=remote", "--in-process", *remote],
        ["train", str(run), "name=small", "--in-process", *remote, "data.cache_gib=1e-6"],
        ["train", str(run), "name=nowhere", "--in-process", *remote, "data.train=s3://sets/none/train"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    said = done.stdout
    assert [line.split()[-1] for line in said.splitlines() if line.startswith("exit code")] == ["0", "0", "2", "2"], (
        said
    )
    assert not store.faults and "attempt 1 of 6" in said, said
    assert "data.cache_gib" in said and "cannot read the manifest s3://sets/none/train/manifest.json" in said, said
    local, found = (read_metrics(root / f"runs/{name}/metrics.jsonl") for name in ("local", "remote"))
    assert [record["train/loss"] for record in found] == [record["train/loss"] for record in local] and len(local) == 4
    copies = list((root / "cache").glob("*/shard.tar"))
    assert copies and sum(path.stat().st_size for path in copies) <= CACHE_BYTES
