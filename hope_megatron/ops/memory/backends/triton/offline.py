"""Compile the kernels for a GPU that is not here, and read what the compiler made of them.

Registers, spills and shared memory are facts of the compiled code. Cycles are an estimate with guessed latencies: good for
comparing variants of a kernel on one architecture, and for nothing else.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton

from hope_megatron.ops.memory.backends.triton.launching import Launch, recorded
from hope_megatron.ops.memory.backends.triton.unchecked import UNCHECKED
from hope_megatron.ops.memory.rule import MemoryCompute, MemoryRule
from hope_megatron.ops.memory.types import Bank, MemoryParams, RateLogits

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.int32: "*i32"}

# Guesses, in cycles: when a result is there, and how long a unit that four warps share is busy with one warp's instruction.
_LATENCY = {
    "LDG": 300, "LDL": 38, "LDS": 30, "LDSM": 33, "LDC": 40, "HMMA": 34, "STS": 26, "STL": 26, "STSM": 28, "STG": 30,
    "SHFL": 26, "MUFU": 22,
}  # fmt: skip
_BUSY = dict.fromkeys(("LDG", "LDL", "LDS", "LDSM", "STS", "STL", "STSM", "STG", "SHFL", "MUFU", "HMMA"), 8)


def launches_of(
    rule: MemoryRule,
    width: int,
    precision: str,
    *,
    rates: tuple[bool, bool, bool] = (True, True, False),
    recompute: bool = False,
) -> list[Launch]:
    """Every launch of forward and backward, of two chunks of one head. precision: of language.py.

    recompute: as `memory_chunked`."""
    from hope_megatron.ops.memory.backends.triton.scan import triton_scan
    from hope_megatron.ops.memory.operator import memory_chunked

    new = lambda *shape: torch.zeros(*shape).requires_grad_()  # noqa: E731
    two = rule.num_layers == 2
    bank = lambda n, o: Bank(new(1, n, width, width) if two else None, new(1, n, o, width)) if n else None  # noqa: E731
    T = 2 * rule.period
    params = MemoryParams(bank(1, width), bank(rule.num_vector, width), bank(rule.num_scalar, 1))
    logits = RateLogits(*(new(1, T, 1) if there else None for there in rates))

    def scan(tensors, rule, groups, *, compute, recompute):  # type: ignore[no-untyped-def]
        return triton_scan(tensors, rule, groups, precision=precision, recompute=recompute)

    backend = UNCHECKED._replace(why_not=lambda case: None, scan=scan)  # nothing runs
    with recorded() as found:
        inputs = [new(1, T, 1, width) for _ in range(3)]
        compute = MemoryCompute(kernel="triton")
        y, state = memory_chunked(
            *inputs, logits, params, rule, compute=compute, recompute=recompute, backends=(backend,)
        )
        (y.sum() + sum(w.sum() for b in state.now if b is not None for w in b if w is not None)).backward()
    return found


def variants(launches: list[Launch]) -> dict[str, Launch]:
    """Those that are compiled apart, by a name that tells them apart within one rule."""
    found: dict[str, Launch] = {}
    for launch in launches:
        sizes = [f"{k}{launch.constants[k]}" for k in ("P", "Q", "PAIRS") if k in launch.constants]
        name = "-".join([launch.kernel.__name__, *sizes])
        name += "-self" if launch.constants.get("SELF") else ""
        same = next((n for n, x in found.items() if n.split("#")[0] == name and x.constants == launch.constants), None)
        if same is None:
            count = sum(n.split("#")[0] == name for n in found)
            found[name if count == 0 else f"{name}#{count + 1}"] = launch
    return found


def compiled(launch: Launch, target: str) -> dict[str, Any]:
    """Compile for "sm_90" or "gfx942": registers, spilled_bytes, shared_bytes; NVIDIA: loop_instructions and walk_cycles too."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature, aligned = {}, {}
    for i, name in enumerate(names):
        x = launch.arguments.get(name)
        if name in launch.constants:
            signature[name] = "constexpr"
        elif isinstance(x, torch.Tensor):
            signature[name], aligned[(i,)] = TYPES[x.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(x, float) else "i32"
    constants = {(names.index(name),): x for name, x in launch.constants.items()}
    nvidia = target.startswith("sm_")
    where = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    options = {"num_warps": launch.warps, "num_stages": 1}
    made = triton.compile(ASTSource(launch.kernel, signature, constants, aligned), target=where, options=options)
    found = {"warps": launch.warps, "shared_bytes": made.metadata.shared}
    if not nvidia:
        return found | _of_amdgcn(made.asm["amdgcn"])
    return found | _of_cubin(made.asm["cubin"], launch.constants.get("NV", 1))


def _of_cubin(cubin: bytes, inner: int) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(option: str) -> str:
            command = [_TOOLS / "cuobjdump", option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, sass = run("--dump-resource-usage"), run("-sass")
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return {"registers": int(found["REG"]), "spilled_bytes": int(found["STACK"]), **walk(sass, inner)}


def _of_amdgcn(text: str) -> dict[str, int]:
    number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # noqa: E731
    return {"registers": number("vgpr_count"), "spilled_bytes": number("private_segment_fixed_size")}


def _expanded(code: list[Any], loops: list[tuple[int, int]], times: int) -> list[Any]:
    """Instructions as they run: those of outermost loops `times` times. loops: first and last address."""
    found: list[Any] = []
    outermost = sorted(x for x in loops if not any(y[0] <= x[0] and x[1] <= y[1] and x != y for y in loops))
    at = 0
    for first, last in outermost:
        found += [x for x in code if at <= x[0] < first]
        found += [x for x in code if first <= x[0] <= last] * times
        at = last + 1
    return found + [x for x in code if at <= x[0]]


def walk(sass: str, inner: int = 1) -> dict[str, int]:
    """One warp goes along the longest loop once (or all there is), alone on its scheduler: stall counts and scoreboards from the
    encoding, `_LATENCY` for the rest. inner: how often loops inside of it run, those over memories."""
    code = []
    for line, after in itertools.pairwise(sass.split("\n")):
        if m := re.match(r"\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);\s+/\* 0x[0-9a-f]{16} \*/", line):
            control = re.search(r"/\* 0x([0-9a-f]{16}) \*/", after)
            code.append((int(m[1], 16), m[2], int(control[1], 16) if control else 0))
    jumps = [(int(m[1], 16), at) for at, text, _ in code if (m := re.search(r"BRA.* `?\(?0x([0-9a-f]+)", text))]
    whole = (code[0][0], code[-1][0]) if code else (0, 0)
    first, last = max(((to, at) for to, at in jumps if to < at), key=lambda span: span[1] - span[0], default=whole)
    code = _expanded(
        [x for x in code if first <= x[0] <= last], [span for span in jumps if first < span[0] < span[1] < last], inner
    )
    now = tensor = tensor_done = 0
    ready, busy = [0] * 6, dict.fromkeys(_BUSY, 0)
    for _, text, control in code:
        stall, sets, reads, waits = (control >> 41) & 15, (control >> 46) & 7, (control >> 49) & 7, (control >> 52) & 63
        op = re.sub(r"^@!?U?P\w+ ", "", text).split()[0].split(".")[0]
        now = max([now, busy.get(op, 0)] + [ready[b] for b in range(6) if waits >> b & 1])
        if op == "HGMMA":  # 2048 bf16 multiply-adds a cycle
            columns = re.search(r"64x(\d+)x", text)
            tensor = max(now, tensor) + (int(columns[1]) if columns else 64) // 2
            tensor_done = tensor + 70
        elif op == "WARPGROUP" and "DEPBAR" in text:
            now = max(now, tensor_done)
        now += {"BAR": 25, "MEMBAR": 15, "FENCE": 15}.get(op, 0)
        if sets < 6:
            ready[sets] = tensor_done if op == "HGMMA" else max(ready[sets], now + _LATENCY.get(op, 10))
        if reads < 6:
            ready[reads] = max(ready[reads], now + 12)
        if op in busy:
            busy[op] = now + _BUSY[op]
        now += max(stall, 1)
    return {"loop_instructions": len(code), "walk_cycles": now}
