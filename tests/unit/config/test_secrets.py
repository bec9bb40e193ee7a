"""Passwords in URIs: nothing that is written has them; the process that needs them gets them."""

from __future__ import annotations

import pytest

from hope_megatron.config import ConfigError, dump_config, resolve_run_config
from hope_megatron.config.secrets import (
    has_credentials,
    is_masked,
    mask_credentials,
    tracking_environment,
    unmask_tracking_uri,
)

URI = "http://alice:s3cret@host:5000/x"
RUN = {
    "name": "test",
    "model": "hope_tiny",
    "training": {"steps": 1000, "seq_length": 512, "global_batch_size": 8},
    "data": {"train": "shards/train", "tokenizer": "shards/tokenizer.model"},
}


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (URI, "http://***@host:5000/x"),
        ("http://alice@host", "http://***@host"),
        ("http://a:p@ss@h/x", "http://***@h/x"),
        ("postgresql://u:p/w@h/db", "postgresql://***@h/db"),
        ("mysql+pymysql://u:p@h:3306/db?ssl=1", "mysql+pymysql://***@h:3306/db?ssl=1"),
        ("postgresql://h/db?user=u&password=p&x=1", "postgresql://h/db?user=u&password=***&x=1"),
        ("https://h/?TOKEN=abc#frag", "https://h/?TOKEN=***#frag"),
        ("could not reach http://a:b@h, nor https://c:d@e/", "could not reach http://***@h, nor https://***@e/"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("http://[::1]:5000/a@b", "http://[::1]:5000/a@b"),
        ("sqlite:////tmp/x@y/mlflow.db", "sqlite:////tmp/x@y/mlflow.db"),
        ("sqlite:///C:/x@y", "sqlite:///C:/x@y"),
        ("databricks://profile", "databricks://profile"),
        ("alice@example.org", "alice@example.org"),
        ("", ""),
    ],
)
def test_user_parts_and_secret_parameters_are_masked(text, masked):
    assert mask_credentials(text) == masked
    assert mask_credentials(masked) == masked
    assert has_credentials(text) == (text != masked)
    assert is_masked(masked) == (text != masked)
    assert not is_masked(text)


@pytest.mark.parametrize(
    ("uri", "environment", "found"),
    [
        ("http://***@host:5000/x", {"MLFLOW_TRACKING_URI": URI}, URI),
        ("http://***@host:5000/x", {"MLFLOW_TRACKING_URI": "http://alice:s3cret@other"}, "http://***@host:5000/x"),
        ("http://***@host:5000/x", {"MLFLOW_TRACKING_USERNAME": "alice"}, "http://host:5000/x"),
        ("http://***@host:5000/x", {}, "http://***@host:5000/x"),
        ("http://host", {"MLFLOW_TRACKING_URI": URI}, "http://host"),
        (URI, {"MLFLOW_TRACKING_USERNAME": "bob"}, URI),
    ],
)
def test_the_environment_knows_what_a_masked_uri_stands_for(uri, environment, found):
    assert unmask_tracking_uri(uri, environment) == found


def test_a_configuration_knows_the_uri_and_writes_it_masked(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = resolve_run_config(RUN, [f"tracking.uri={URI}"], source="test")
    assert config.tracking.uri == URI
    for text in (dump_config(config), config.model_dump_json(), str(config.model_dump())):
        assert "s3cret" not in text and "alice" not in text and "http://***@host:5000/x" in text
    again = {**RUN, "tracking": {"uri": "http://***@host:5000/x"}}
    assert resolve_run_config(again, source="test").tracking.uri == "http://***@host:5000/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_environment(config.tracking.uri)["MLFLOW_TRACKING_URI"])
    assert resolve_run_config(again, source="test").tracking.uri == URI
    assert tracking_environment("http://host") == tracking_environment(None) == {}


@pytest.mark.parametrize(
    "override", [f"tracking.url={URI}", f"tracking.mlflow={URI}", f"tracking.uri=[{URI}]", f"{URI}", f"optim.lr={URI}"]
)
def test_messages_do_not_repeat_a_password(override):
    with pytest.raises(ConfigError) as caught:
        resolve_run_config(RUN, [override], source="test")
    assert "s3cret" not in str(caught.value)
