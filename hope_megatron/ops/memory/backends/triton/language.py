"""What the memory kernels are written in: tiles in memory, products at a precision, and the functions of the inner problem.

Tokens are rows, everywhere, and weights are stored as what rows are multiplied by (W2^T [d, h], W1^T [h, d]): sums over a token's
features then stay within a warp. No kernel transposes a value: on Hopper `tl.dot(tl.trans(x), ...)` with x from another product was
compiled wrong by Triton 3.4 to 3.7.0. A tile that is wanted both ways is stored and loaded again with its strides exchanged.

PRECISION of products, and of the functions around them (sums are in float32):
    fp32        float32 products, on the units for single numbers: for the interpreter
    tf32x3      float32 operands, each as two of TF32, three products: float32 on tensor cores
    tf32        float32 operands, TF32 products
    bf16        operands rounded to bfloat16
    bf16_ptx    the same, with NVIDIA's approximate exp, sigmoid, tanh and rsqrt
    bf16_emulated    what bf16 does, for the interpreter, whose products of bfloat16 are wrong
"""

from __future__ import annotations

import triton
import triton.language as tl

SMALL = tl.constexpr(1e-12)
"""Square of `inner.EPSILON`."""


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """x as products take it. Round once what is used several times."""
    if PRECISION == "bf16" or PRECISION == "bf16_ptx":
        return x.to(tl.bfloat16)
    elif PRECISION == "bf16_emulated":
        return x.to(tl.bfloat16).to(tl.float32)
    else:
        return x.to(tl.float32)


@triton.jit
def mm(a, b, PRECISION: tl.constexpr):
    """a b, summed in float32."""
    if PRECISION == "tf32" or PRECISION == "tf32x3":
        return tl.dot(operand(a, PRECISION), operand(b, PRECISION), input_precision=PRECISION)
    else:
        return tl.dot(operand(a, PRECISION), operand(b, PRECISION), input_precision="ieee")


@triton.jit
def add_mm(base, a, b, PRECISION: tl.constexpr):
    """base + a b, in the same accumulators."""
    if PRECISION == "tf32" or PRECISION == "tf32x3":
        return tl.dot(operand(a, PRECISION), operand(b, PRECISION), base, input_precision=PRECISION)
    else:
        return tl.dot(operand(a, PRECISION), operand(b, PRECISION), base, input_precision="ieee")


@triton.jit
def mm_exact(a, b, PRECISION: tl.constexpr):
    """a b where bfloat16 is too coarse: of two parts of each operand, three of the four products (2^-16)."""
    if PRECISION == "fp32" or PRECISION == "tf32x3":
        return mm(a, b, PRECISION)
    elif PRECISION == "tf32":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")
    else:
        a_high, b_high = operand(a, PRECISION), operand(b, PRECISION)
        a_low = operand(a - a_high.to(tl.float32), PRECISION)
        b_low = operand(b - b_high.to(tl.float32), PRECISION)
        return add_mm(add_mm(mm(a_low, b_high, PRECISION), a_high, b_low, PRECISION), a_high, b_high, PRECISION)


@triton.jit
def mm_if(a, b, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """a b, by `mm_exact` if EXACT."""
    if EXACT:
        return mm_exact(a, b, PRECISION)
    else:
        return mm(a, b, PRECISION)


@triton.jit
def operand_if(x, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """What is kept of x for products: as it is if they are exact."""
    if EXACT:
        return x
    else:
        return operand(x, PRECISION)


# Tiles. A matrix is contiguous; rows of tokens begin every `stride` elements.


@triton.jit
def place(i, n, T, HEADS, C: tl.constexpr):
    """Number of the first token of chunk i of stream n in tensors [B, T, HEADS, ...]. T is a multiple of C."""
    return ((n // HEADS).to(tl.int64) * T + i * C) * HEADS + n % HEADS


@triton.jit
def load(base, R: tl.constexpr, S: tl.constexpr):
    """A matrix [R, S]."""
    return tl.load(base + tl.arange(0, R)[:, None] * S + tl.arange(0, S)[None, :])


@triton.jit
def load_t(base, R: tl.constexpr, S: tl.constexpr):
    """The transpose [S, R] of a matrix [R, S]."""
    return tl.load(base + tl.arange(0, S)[:, None] + tl.arange(0, R)[None, :] * S)


@triton.jit
def whole(V_at, A_at, R: tl.constexpr, S: tl.constexpr, ANCHORED: tl.constexpr):
    """Weights [R, S] of V = W - A and A. Not ANCHORED: W is kept as it is."""
    W = load(V_at, R, S)
    if ANCHORED:
        W += load(A_at, R, S)
    return W


@triton.jit
def whole_t(V_at, A_at, R: tl.constexpr, S: tl.constexpr, ANCHORED: tl.constexpr):
    """The transpose of `whole`."""
    W = load_t(V_at, R, S)
    if ANCHORED:
        W += load_t(A_at, R, S)
    return W


@triton.jit
def store(base, x, R: tl.constexpr, S: tl.constexpr):
    tl.store(base + tl.arange(0, R)[:, None] * S + tl.arange(0, S)[None, :], x)


@triton.jit
def rows(base, stride, C: tl.constexpr, W: tl.constexpr):
    """Tokens [C, W]."""
    return tl.load(base + tl.arange(0, C)[:, None] * stride + tl.arange(0, W)[None, :])


@triton.jit
def columns(base, stride, C: tl.constexpr, W: tl.constexpr):
    """Tokens as columns [W, C]."""
    return tl.load(base + tl.arange(0, C)[None, :] * stride + tl.arange(0, W)[:, None])


@triton.jit
def store_rows(base, x, stride, C: tl.constexpr, W: tl.constexpr):
    tl.store(base + tl.arange(0, C)[:, None] * stride + tl.arange(0, W)[None, :], x)


@triton.jit
def each(base, stride, C: tl.constexpr):
    """One number of every token, [C]."""
    return tl.load(base + tl.arange(0, C) * stride)


@triton.jit
def store_each(base, x, stride, C: tl.constexpr):
    tl.store(base + tl.arange(0, C) * stride, x)


@triton.jit
def meet(met, count, PROGRAMS: tl.constexpr):
    """Wait until `count` programs have come here, counted at `met`: then each sees what the others stored before.

    All of them run at once, by a cooperative launch (`launching.launch_together`). The count decides no result: the same bits
    whoever comes first.
    """
    tl.debug_barrier()  # of all threads of this program, before one of them says so
    if PROGRAMS > 1:
        tl.atomic_add(met, 1, sem="release", scope="gpu")
        while tl.atomic_add(met, 0, sem="acquire", scope="gpu") < count:
            pass
        tl.debug_barrier()


# Functions


@triton.jit
def _ptx(x, NAME: tl.constexpr):
    """One instruction of the special function unit."""
    return tl.inline_asm_elementwise(NAME + ".f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def exp(x, PRECISION: tl.constexpr):
    if PRECISION == "bf16_ptx":
        return _ptx(x * 1.4426950408889634, "ex2.approx.ftz")
    else:
        return tl.exp(x)


@triton.jit
def sigmoid(x, PRECISION: tl.constexpr):
    if PRECISION == "bf16_ptx":  # tanh.approx is good to 2^-11; a bfloat16 operand keeps 2^-9
        return 0.5 * _ptx(0.5 * x, "tanh.approx") + 0.5
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x, PRECISION: tl.constexpr):
    if PRECISION == "bf16_ptx":
        return _ptx(x, "tanh.approx")
    else:
        y = -2.0 * tl.abs(x)
        size = one_minus_exp(y) / (1.0 + tl.exp(y))
        return tl.where(x < 0, -size, size)


@triton.jit
def rsqrt(x, PRECISION: tl.constexpr):
    if PRECISION == "bf16_ptx":
        return _ptx(x, "rsqrt.approx.ftz")
    else:
        return 1.0 / tl.sqrt_rn(x)


@triton.jit
def log_sigmoid(x):
    """log sigmoid(x), to rounding also where it is close to zero: log(1 + y) as log(u) y / (u - 1) for u = 1 + y rounded."""
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    return tl.minimum(x, 0.0) - tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) for x <= 0, to rounding also where it is close to zero."""
    u = tl.exp(x)
    inside = (u < 1.0) & (u > 0.0)
    ratio = x / tl.where(inside, tl.log(tl.where(inside, u, 0.5)), 1.0)
    return tl.where(inside, (1.0 - u) * ratio, tl.where(u == 0.0, 1.0, -x))


@triton.jit
def silu(z, PRECISION: tl.constexpr):
    return z * sigmoid(z, PRECISION)


@triton.jit
def dsilu(z, PRECISION: tl.constexpr):
    """Derivative of SiLU."""
    s = sigmoid(z, PRECISION)
    return s * (1.0 + z * (1.0 - s))


@triton.jit
def d2silu(z, PRECISION: tl.constexpr):
    """Second derivative of SiLU."""
    s = sigmoid(z, PRECISION)
    return s * (1.0 - s) * (2.0 + z * (1.0 - 2.0 * s))


@triton.jit
def inverse_norm(x, PRECISION: tl.constexpr):
    """1 / |x| of every row, [C], as `inner.unit` has it."""
    return rsqrt(tl.sum(x * x, 1) + SMALL, PRECISION)


@triton.jit
def unit_backward(d, y, scale):
    """Gradient of x for y = unit(x) = x scale."""
    return (d - y * tl.sum(y * d, 1)[:, None]) * scale[:, None]
