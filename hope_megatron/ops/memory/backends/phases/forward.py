"""Forward of memories that stand in a loop over chunks: the loop, then what is read, all chunks at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_megatron.ops.memory.backends.phases.arithmetic import Products, length
from hope_megatron.ops.memory.backends.phases.form import Form
from hope_megatron.ops.memory.backends.phases.read import Read, read
from hope_megatron.ops.memory.backends.phases.tables import Consts, MomentumTables, Tables
from hope_megatron.ops.memory.backends.phases.write import Inputs, Scratch, Written, bases, generate, given, learn


class Stream(NamedTuple):
    """What memories are given, b chunks of C tokens: x_k, x_v and logits, or keys, values and log-rates."""

    k: Tensor  # [N, T, d]
    v: Tensor  # [N, T, d]
    eta: Tensor  # [N, T]
    alpha: Tensor  # [N, T]
    theta: Tensor | None = None  # of momentum

    def map(self, fn: Callable[[Tensor], Tensor]) -> Stream:
        """`fn` of all that is there."""
        return Stream(*(None if x is None else fn(x) for x in self))

    def chunks(self, C: int, begin: int, stop: int) -> Stream:
        """Chunks from begin to stop."""
        return self.map(lambda x: x[:, begin * C : stop * C])

    def log_rates(self, C: int) -> Tensor:
        """[N, b, 2 or 3, C]."""
        rates = [x for x in self[2:] if x is not None]
        return torch.stack(rates, 1).unflatten(2, (-1, C)).transpose(1, 2).contiguous()


class Weights:
    """Weights of n memories at the start of b chunks as [A | V], V = W - A, with momentum as [A | V | S]: out
    [n, N, b, d, 1 + parts, h], and where W2 is written inner [n, N, b, h, 1 + parts, d], else W2 itself [n, N, h, d]. What changes
    of them, after the last chunk: out_end [n, N, 1, d, parts, h], inner_end.

    They begin with what changes, `first` [n, N, parts, d, h] and `first_in` [n, N, parts, h, d] (or W2).
    """

    def __init__(self, form: Form, first: Tensor, first_in: Tensor, A: Tensor, A_in: Tensor | None, b: int):
        self.lead, self.writes_in = form.lead, form.writes_in
        self.out, self.out_end = _room(first, A, b)
        self.inner, self.inner_end = _room(first_in, A_in, b) if form.writes_in else (first_in, None)

    def at(self, i: int) -> tuple[Tensor, Tensor]:
        """Those of chunk i."""
        return self.out[:, :, i : i + 1], self.inner[:, :, i : i + 1] if self.writes_in else self.inner

    def write(self, p: Products, i: int, t: Written, x: Inputs) -> None:
        """Chunk i's writes: V_C = gamma_C V - rows^T (Gamma_C keys); README.md has those with momentum."""
        self._layer(p, i, self.out, self.out_end, t.rows, t.keys_end, x.tables)
        if self.writes_in:
            self._layer(p, i, self.inner, self.inner_end, t.rows_in, x.k_end, x.tables)

    @staticmethod
    def _layer(p: Products, i: int, starts, end, rows, keys_end, t: Tables) -> None:
        now = starts[:, :, i : i + 1, :, 1:]
        after = starts[:, :, i + 1 : i + 2, :, 1:] if i + 1 < starts.size(2) else end
        torch.mul(now, t.kept_by_column, out=after)
        if t.m0_end is not None:
            after[..., 0, :].addcmul_(now[..., 1, :], t.m0_end)
        p.add(after.flatten(-2), rows.mT, keys_end, alpha=-1)

    def kept(self, every: int) -> Kept:
        """What `again` takes."""
        starts, lead = self.out[:, :, ::every, :, 1:].transpose(3, 4), self.lead
        inner = self.inner[:, :, ::every, :, 1:].transpose(3, 4).contiguous() if self.writes_in else None
        return Kept(
            starts[:lead, :, :, 0, 0].contiguous(), starts[lead:].contiguous(), self.out_end, inner, self.inner_end
        )


class Kept(NamedTuple):
    """What changes, at the start of every n-th chunk, m of them, and after the last chunk."""

    scalars: Tensor  # the row of scalar memories, [lead, N, m, h]
    matrices: Tensor  # [n - lead, N, m, parts, d, h]
    end: Tensor  # [n, N, 1, d, parts, h]
    inner: Tensor | None  # [n, N, m, parts, h, d]
    inner_end: Tensor | None

    def part(self, begin: int, stop: int) -> Kept:
        """Starts from begin to stop, and the next one as their end."""
        rows = F.pad(self.scalars[:, :, :, None, None], (0, 0, 0, self.matrices.size(4) - 1))
        out, end, inner_end = torch.cat([rows, self.matrices]) if len(rows) else self.matrices, self.end, self.inner_end
        if stop < out.size(2):
            after = lambda x: None if x is None else x[:, :, stop : stop + 1].transpose(3, 4)  # noqa: E731
            end, inner_end = after(out), after(self.inner)
        inner = None if self.inner is None else self.inner[:, :, begin:stop]
        return Kept(self.scalars, out[:, :, begin:stop], end, inner, inner_end)


def _room(first: Tensor, A: Tensor, b: int) -> tuple[Tensor, Tensor]:
    n, N, parts, r, columns = first.shape
    starts = first.new_empty(n, N, b, r, 1 + parts, columns)
    starts[:, :, 0, :, 1:], starts[..., 0, :] = first.transpose(2, 3), A.unsqueeze(2)
    return starts, first.new_empty(n, N, 1, r, parts, columns)


class Passed(NamedTuple):
    """What a loop over chunks leaves behind, beside the weights."""

    inputs: tuple[Tensor, Tensor, Tensor]
    """Keys and values [N, b, C, d], log-rates [N, b, 2, C]."""
    rows: Tensor | None
    """Of M_mem, [N, b, C, d]."""
    rows_in: Tensor | None


def loop(form: Form, c: Consts | MomentumTables, p: Products, stream: Stream, weights: Weights, A: Tensor) -> Passed:
    """Write chunk after chunk; `weights` is filled."""
    (N, T, d), h, C = stream.k.shape, weights.out.size(-1), form.C
    b, rows, rows_in = T // C, [], []
    scratch = Scratch(form, N, 1, d, h, stream.k)
    if form.generates:
        w_in = None if form.writes_in else weights.inner[:4]
        _, base, applied, _ = bases(form, p, *stream[:4], A[:4], w_in)
        logs = base.new_empty(N, b, 2, C)
    else:
        logs = stream.log_rates(C)
        k, v = (x.unflatten(1, (b, C)) for x in (stream.k, stream.v))
        inputs = given(form, c, Scratch(form, N, b, d, h, stream.k), k, v, logs)
    for i in range(b):
        at, w = slice(i, i + 1), weights.at(i)
        if form.generates:
            x, _ = generate(form, c, p, base[:, :, at], applied[:, :, at], *w, scratch, logs[:, at])
        else:
            x = inputs.at(i)
        t = learn(form, p, x, *w, scratch)
        weights.write(p, i, t, x)
        if form.mem:
            rows.append(t.rows[-1, :, 0])
            rows_in.append(t.rows_in[-1, :, 0])
    if form.generates:
        raw = base[2:]
        k, v = raw / length(raw)
    return Passed((k, v, logs), *((torch.stack(x, 1) if x else None) for x in (rows, rows_in)))


def read_memory(
    form: Form, c: Consts | MomentumTables, p: Products, q, k, keys, rows, rows_in, logs, weights: Weights
) -> tuple[Read, Read]:
    """Both layers' reads of M_mem. q, k [N, b, C, d]; keys [N, b, C, h], None: computed again."""
    reach = c.read(logs)
    A, *V = (weights.out[-1, ..., j, :].contiguous() for j in range(1 + form.parts))
    A_in, *V_in = (weights.inner[-1, ..., j, :].contiguous() for j in range(1 + form.parts))
    if keys is None:
        keys = F.silu(p.mm(k, (A_in + V_in[0]).mT))
        keys = keys / length(keys) if form.unit_keys else keys
    first = read(p, q, k, rows_in, V_in[0], A_in, *reach, *V_in[1:])
    return first, read(p, F.silu(first.y), keys, rows, V[0], A, *reach, *V[1:])


def again(
    form: Form,
    c: Consts | MomentumTables,
    p: Products,
    stream: Stream,
    w_in,
    A,
    A_in,
    kept: Kept,
    every: int,
    first: int,
) -> Weights:
    """The weights of a segment of chunks that begins with chunk `first`, a kept one. Those between kept ones are computed again,
    from all kept ones at once: as if each began a stream of its own."""
    N, T, _ = stream.k.shape
    b, begin = T // form.C, first // every
    kept = kept.part(begin, begin - (-b // every))
    out, inner = kept.matrices, kept.inner if form.writes_in else w_in
    weights = Weights(form, out[:, :, 0], inner[:, :, 0] if form.writes_in else inner, A, A_in, b)
    weights.out_end, weights.inner_end = kept.end, kept.inner_end
    whole = b // every
    for m, run, at in ((whole, every, 0), (1, b % every, whole)):
        if m == 0 or run == 0:
            continue
        chunks = slice(at * every, at * every + m * run)
        beside = lambda x: x.unsqueeze(2).expand(-1, -1, m, -1, -1).flatten(1, 2).contiguous()  # noqa: B023, E731
        pick = lambda x: x[:, :, at : at + m].flatten(1, 2)  # noqa: B023, E731
        begun = Weights(
            form, pick(out), pick(inner) if form.writes_in else beside(inner), beside(A),
            beside(A_in) if form.writes_in else None, run,
        )  # fmt: skip
        if run > 1:
            alone = stream.chunks(form.C, chunks.start, chunks.stop).map(
                lambda x: x.unflatten(1, (m, -1)).flatten(0, 1)  # noqa: B023
            )
            loop(form, c, p, alone, begun, beside(A))
        back = lambda x: x[..., 1:, :].unflatten(1, (N, m)).flatten(2, 3)  # noqa: B023, E731
        weights.out[:, :, chunks, :, 1:] = back(begun.out)
        if form.writes_in:
            weights.inner[:, :, chunks, :, 1:] = back(begun.inner)
    return weights
