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

from data_pipeline.ledger import Ledger
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import train_tokenizer
from hope_megatron.training.metrics import read_metrics

from ..unit.data.stores import FaultyServer, running
from .test_data_in_training import RUN, SCRIPT, VOCAB

pytestmark = pytest.mark.distributed

CACHE_BYTES = 1 << 18


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A set of many small shards, another, and a tokenizer."""
    root = tmp_path_factory.mktemp("remote")
    texts = {
        name: Path(module.__file__).read_text()[:40_000] for name, module in (("first", json.decoder), ("more", os))
    }
    train_tokenizer(texts.values(), root / "tokenizer.model", VOCAB)
    for name, text in texts.items():
        (root / f"{name}.txt").write_text(text)
        from data_pipeline.corpus import ReadOptions

        prepare(
            [root / f"{name}.txt"], root / "tokenizer.model", root / name, held_out_fraction=0.0, workers=1,
            shard_tokens=6000, read=ReadOptions(text_unit="chunk", chunk_bytes=500),
        )  # fmt: skip
    return root


@pytest.fixture
def store(root, monkeypatch):
    """The same below s3://sets, behind a proxy that can fail."""
    import s3fs

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    port = moto.get_host_and_port()[1]
    environment = {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1", "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "XDG_CACHE_HOME": str(root / "cache"),
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    client = s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{port}", skip_instance_cache=True)
    client.mkdirs("sets")
    for path in root.glob("more/train/*"):
        data = bytearray(path.read_bytes())
        if path.suffix == ".tar":
            data[len(data) // 2] ^= 1
        client.pipe(f"sets/bad/train/{path.name}", bytes(data))
    for path in [root / "tokenizer.model", *root.glob("*/train/*")]:
        client.pipe(f"sets/{path.relative_to(root)}", path.read_bytes())
    with running(FaultyServer(upstream=port)) as server:
        server.store = client
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server
    moto.stop()


def run_commands(commands):
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)], capture_output=True, text=True, timeout=280
    )
    codes = [line.split()[-1] for line in finished.stdout.splitlines() if line.startswith("exit code")]
    return codes, finished.stdout + finished.stderr


def test_shards_in_a_store_train_as_those_on_disk(root, store):
    store.only, store.faults = r"\.(tar|idx)$", ["503", "cut", "reset", "", "cut"]
    run = root / "run.yaml"
    run.write_text(RUN.format(root=root, vocab=VOCAB))
    remote = [
        "data.train=s3://sets/first/train", "data.mix_with={more: s3://sets/more/train}",
        "data.tokenizer=s3://sets/tokenizer.model", f"data.cache_gib={CACHE_BYTES / 2**30}",
    ]  # fmt: skip
    bad = [*remote, "data.mix_with={more: s3://sets/bad/train}", f"data.cache_dir={root}/second", "training.steps=2"]
    codes, said = run_commands([
        ["train", str(run), "name=local"],
        ["train", str(run), "name=remote", *remote],
        ["data", "inspect", str(root / "runs/remote"), "--step", "2"],
        ["train", str(run), "name=small", *remote, "data.cache_gib=1e-6"],
        ["train", str(run), "name=nowhere", *remote, "data.train=s3://sets/none/train"],
        ["train", str(run), "name=skip", *bad],
        ["train", str(run), "name=stop", *bad, "data.on_corrupt=stop"],
    ])  # fmt: skip
    assert codes == ["0", "0", "0", "2", "2", "0", "2"], said
    assert not store.faults and "attempt 1 of 6" in said, said
    assert "data.cache_gib" in said, said
    assert "cannot read the manifest s3://sets/none/train/manifest.json: there is no such object" in said, said
    local, found = (read_metrics(root / f"runs/{name}/metrics.jsonl") for name in ("local", "remote"))
    assert [record["train/loss"] for record in found] == [record["train/loss"] for record in local] and len(local) == 4
    copies = list((root / "cache/hope_megatron/shards").glob("*/shard.tar"))
    assert copies and sum(path.stat().st_size for path in copies) <= CACHE_BYTES

    # Other bytes in the store: the run goes on without that shard and says so, as with shards on disk.
    (entry,) = Ledger(root / "runs/skip/data_ledger.jsonl").entries()
    assert (entry["kind"], entry["location"]) == ("corrupt", "s3://sets/bad/train")
    assert f"{entry['shard']} has changed: its SHA-256 is not the manifest's" in said
