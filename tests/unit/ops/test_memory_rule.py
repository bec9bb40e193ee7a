"""The rule refuses what does not exist, and the operator what does not fit the rule, by name."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch

from hope_megatron.config import MemoryConfig
from hope_megatron.ops.memory import (
    Bank,
    MemoryCompute,
    MemoryParams,
    MemoryRule,
    MemoryRuleError,
    RateLogits,
    initial_state,
    memory_chunked,
    memory_recurrent,
)
from hope_megatron.ops.memory.backends import registry
from hope_megatron.ops.memory.backends.registry import KernelError, chosen_kernels
from hope_megatron.ops.memory.rule import pick

B, T, H, d, h = 2, 9, 3, 16, 32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": "L2"}, 'objective="L2" is none of "dot", "l2", "huber", "lp"'),
        ({"num_layers": 3}, "num_layers=3 is none of 1, 2"),
        ({"num_layers": True}, "num_layers=True is none of 1, 2"),
        ({"chunk_tokens": 0}, "chunk_tokens=0 must be greater than 0"),
        ({"chunk_tokens": 8.0}, "chunk_tokens=8.0 must be int"),
        ({"self_chunk_tokens": "8"}, 'self_chunk_tokens="8" must be int or None'),
        ({"read_skip": 1}, "read_skip=1 must be bool"),
        ({"huber_delta": 0.0}, "huber_delta=0.0 must be greater than 0"),
        ({"lp_power": 0.5}, "lp_power=0.5 must be at least 1"),
        ({"eta_max": -1}, "eta_max=-1 must be at least 0.0"),
        ({"momentum_max": 1.0}, "momentum_max=1.0 must be less than 1.0"),
        ({"chunk_tokens": 8, "self_chunk_tokens": 12}, "one must divide the other"),
        ({"num_layers": 1}, "set adaptive_key, .* or num_layers=2"),
    ],
)
def test_values_that_do_not_exist_are_refused(values, message):
    with pytest.raises(MemoryRuleError, match=message):
        MemoryRule(**values)


def test_the_configuration_has_the_rules_fields_defaults_and_words():
    config = MemoryConfig()
    assert config.rule == MemoryRule() and config.compute == MemoryCompute()
    for kind in (MemoryRule, MemoryCompute):
        for field in fields(kind):
            assert MemoryConfig.model_fields[field.name].description, field.name
    changed = MemoryConfig(chunk_tokens=64, self_chunk_tokens=16, objective="l2", kernel="torch")
    assert changed.rule == MemoryRule(64, 16, objective="l2", eta_max=changed.eta_max)
    assert MemoryConfig.model_validate(json.loads(changed.model_dump_json())) == changed
    assert pick(MemoryRule, changed) == changed.rule


def arguments(**changes):
    bank = lambda n, o: Bank(torch.randn(H, n, h, d), torch.randn(H, n, o, h))  # noqa: E731
    values = dict(
        q=torch.randn(B, T, H, d), k=torch.randn(B, T, H, d), v=torch.randn(B, T, H, d),
        logits=RateLogits(torch.randn(B, T, H), torch.randn(B, T, H)),
        params=MemoryParams(bank(1, d), bank(2, d), bank(2, 1)), rule=MemoryRule(8),
    )  # fmt: skip
    return values | changes


BANK = Bank(torch.randn(H, 2, h, d), torch.randn(H, 2, d, h))


@pytest.mark.parametrize("operator", [memory_chunked, memory_recurrent])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.randn(B, T, H, 2 * d)}, r"k has shape \[2, 9, 3, 32\]; expected \[2, 9, 3, 16\]"),
        ({"q": torch.randn(B, T, d)}, r"q has shape \[2, 9, 16\]; expected \[B, T, H, d\]"),
        ({"q": torch.randn(B, 0, H, d)}, r"with at least one of each"),
        ({"v": torch.zeros(B, T, H, d, dtype=torch.long)}, "v holds torch.int64"),
        ({"v": torch.zeros(B, T, H, d, device="meta")}, "v is on meta, q on cpu"),
        ({"logits": RateLogits(torch.randn(B, T, 1))}, r"logits.eta has shape \[2, 9, 1\]"),
        ({"bank": {"vector": None}}, "params.vector is missing, but the rule has 2 such memories"),
        ({"bank": {"scalar": Bank(None, torch.randn(H, 2, 1, h))}}, "params.scalar.w_in is None"),
        ({"bank": {"mem": Bank(torch.randn(H, 1, 32, 32), torch.randn(H, 1, 32, 32))}}, r"params.mem.w_in has shape"),
        ({"bank": {"vector": Bank(torch.randn(H, 2, 8, d), torch.randn(H, 2, d, 8))}}, "params.vector.w_in has shape"),
        ({"rule": MemoryRule(8, adaptive_key=False, adaptive_value=False)}, "params.vector is there"),
        ({"state": "momentum"}, "momentum goes with theta"),
        ({"state": "heads"}, r"state.now.mem.w_in has shape \[2, 1, 1, 32, 16\]; expected \[2, 3, 1, 32, 16\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(operator, change, message):
    values = arguments()
    if "bank" in change:
        values["params"] = values["params"]._replace(**change["bank"])
    elif "state" in change:
        state = initial_state(values["params"], B, momentum=change["state"] == "momentum", dtype=torch.float32)
        if change["state"] == "heads":
            cut = lambda bank: Bank(*(w[:, :1] for w in bank))  # noqa: E731
            state = state._replace(now=state.now._replace(mem=cut(state.now.mem)))
        values["state"] = state
    else:
        values |= change
    with pytest.raises(MemoryRuleError, match=message):
        operator(**values)


@pytest.mark.parametrize(
    ("kernel", "change", "message"),
    [
        ("cpu", {"objective": "l2", "eta_max": 0.1}, r"memory\.kernel=cpu .* objective=\"l2\", it takes \"dot\""),
        ("cpu", {"read": "chunk_start"}, 'read="chunk_start", it takes "causal"'),
        ("triton", {}, "memory.kernel=triton cannot compute"),
    ],
)
def test_a_kernel_that_cannot_take_a_rule_is_refused_with_the_reason(kernel, change, message):
    values = arguments(rule=MemoryRule(8, **change))
    with pytest.raises(KernelError, match=message):
        memory_chunked(**values, compute=MemoryCompute(kernel=kernel))


def test_the_choice_is_said_once_and_kept(monkeypatch, caplog):
    registry._choose.cache_clear()
    chosen_kernels.clear()
    values = arguments(rule=MemoryRule(8, dgd_layers="input", eta_max=0.05))
    with caplog.at_level("INFO", logger=registry.log.name):
        for _ in range(3):
            memory_chunked(**values)
    (record,) = caplog.records
    assert "d 16, h 32, chunks of 8, float32 on cpu" in record.getMessage()
    (entry,) = chosen_kernels
    assert entry["kernel"].startswith("the chunk form") and any('dgd_layers="input"' in x for x in entry["passed_over"])
    registry._choose.cache_clear()
    memory_chunked(**values | {"rule": replace(values["rule"], eta_max=0.04)})
    assert len(chosen_kernels) == 1

    monkeypatch.setenv("HOPE_NATIVE", "0")
    with pytest.raises(KernelError, match=r"set model\.memory\.kernel=torch"):
        memory_chunked(**values)
