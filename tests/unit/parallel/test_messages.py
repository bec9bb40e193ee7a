"""Control messages are typed data, authenticated by the token of the attempt."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hope_megatron.checkpoint.format import CheckpointDamagedError
from hope_megatron.parallel.messages import ControlError, RemoteError, pack, unpack
from hope_megatron.runtime.token import TAG_BYTES, TOKEN_VARIABLE, tag

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_values_arrive_as_they_were_sent(value: object) -> None:
    assert unpack(pack(value, 3, 7), 3, 7) == value


def test_paths_and_errors_keep_their_kind() -> None:
    assert unpack(pack([Path("/a b"), (1, 2)], 0, 0), 0, 0) == [Path("/a b"), [1, 2]]
    error = unpack(pack(CheckpointDamagedError("which file"), 0, 0), 0, 0)
    assert type(error) is CheckpointDamagedError and str(error) == "which file" and error.is_user_error
    assert type(unpack(pack(OSError("disk"), 0, 0), 0, 0)) is OSError


@pytest.mark.parametrize("module", ["os", "subprocess", "hope_megatron.nowhere", "builtins"])
def test_an_error_is_never_a_way_to_call_something(module: str) -> None:
    data = json.dumps({"error": [module, "system" if module == "os" else "Popen", "touch /tmp/x", True]}).encode()
    found = unpack(tag(b"0:0:" + data) + data, 0, 0)
    assert type(found) is RemoteError and found.is_user_error


def test_other_tokens_senders_numbers_and_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret of this attempt")
    message = pack({"stop": 1}, 1, 5)
    assert unpack(message, 1, 5) == {"stop": 1}
    flipped = bytes([*message[:-1], message[-1] ^ 1])
    for other, sender, number in ((message, 0, 5), (message, 1, 6), (flipped, 1, 5), (b"", 1, 5)):
        with pytest.raises(ControlError, match="not from a rank of this attempt"):
            unpack(other, sender, number)
    monkeypatch.setenv(TOKEN_VARIABLE, "another")
    with pytest.raises(ControlError):
        unpack(message, 1, 5)


def test_pickles_are_neither_sent_nor_read() -> None:
    with pytest.raises(ControlError, match="is no control message"):
        pack({1, 2}, 0, 0)
    data = pickle.dumps({"a": 1})
    with pytest.raises(ValueError, match=r"decode|Expecting|utf"):
        unpack(tag(b"0:0:" + data) + data, 0, 0)
    assert len(pack(None, 0, 0)) == TAG_BYTES + 4
