"""NVIDIA's apex is told from its namesake by what it provides, without importing either."""

from __future__ import annotations

import sys

import pytest

from hope_megatron.config.environment import detect_apex, fused_kernels, installed_versions


@pytest.fixture
def fake_site(tmp_path, monkeypatch):
    """A directory on sys.path in which importing anything fails the test."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(*files: str) -> str:
        for name in files:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("raise AssertionError('imported')\n")
        return str(tmp_path / "apex")

    return make


def test_nvidia_apex(fake_site):
    location = fake_site(
        "apex/__init__.py",
        "apex/normalization/fused_layer_norm.py",
        "apex/multi_tensor_apply/__init__.py",
        "amp_C.py",
    )
    apex = detect_apex()
    assert (apex.kind, apex.location) == ("nvidia", location)
    assert dict(apex.provides) == {"fused norms": False, "multi-tensor kernels": True, "fused weight gradient": False}
    assert "apex" not in sys.modules
    assert "multi-tensor kernels" in apex.describe()


def test_web_toolkit_of_the_same_name(fake_site):
    fake_site("apex/__init__.py", "apex/lib/libapex.py", "apex/models.py", "apex/views.py")
    apex = detect_apex()
    assert apex.kind == "other"
    assert "not NVIDIA's apex" in apex.describe()
    kernel = next(kernel for kernel in fused_kernels(cuda=True) if kernel.name == "NVIDIA apex")
    assert not kernel.available


def test_no_apex(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert detect_apex().kind == "absent"
    assert not any(kernel.available for kernel in fused_kernels(cuda=False))


def test_versions_of_what_is_not_there():
    versions = installed_versions(("pydantic", "no-such-distribution"))
    assert versions["pydantic"] is not None
    assert versions["no-such-distribution"] is None
