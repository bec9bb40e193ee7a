"""What an operator of PyTorch costs a GPU: how many kernels it starts, which kind they are, its bytes and its FLOPs."""

from __future__ import annotations

import contextlib
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

Family = Literal[
    "products", "solves", "attention", "norms", "pointwise", "reductions", "copies", "indexing", "memories"
]


def _names(text: str) -> set[str]:
    return set(text.split())


# Operators that start no kernel: views, allocations, questions.
_NOTHING = _names(
    """_unsafe_view detach alias empty empty_like empty_strided new_empty new_empty_strided lift_fresh _local_scalar_dense
    is_same_size set_ resize_ is_pinned _has_compatible_shallow_copy_type _reshape_alias sym_size sym_stride sym_numel device"""
)
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "is_nonzero",
    "masked_select",
}
"""Operators that the host cannot go on from before the device has come to them."""

# Kernels of operators that start more than one on CUDA (read in ATen's CUDA sources of PyTorch 2.13).
_SEVERAL = {
    "constant_pad_nd": 2,  # fill, copy
    "embedding_dense_backward": 4,  # sort, segments, two sums
    "eye": 2,  # zeros, ones
    "index_put": 3,  # clone, sort, accumulate
    "index_put_": 2,
    "_index_put_impl_": 2,
    "linalg_solve_triangular": 3,  # copy of the right-hand side, pointers, solve
    "masked_fill": 2,  # clone, fill
    "nonzero": 3,
}

_FAMILIES: dict[Family, set[str]] = {
    "products": {
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "addbmm",
        "mv",
        "dot",
        "_scaled_mm",
        "convolution",
        "convolution_backward",
    },
    "solves": {"linalg_solve_triangular", "triangular_solve"},
    "norms": {"native_layer_norm", "native_layer_norm_backward"},
    "reductions": _names(
        """sum mean amax amin max min linalg_vector_norm norm _foreach_norm cumsum cummax logsumexp argmax prod all any _softmax
        _softmax_backward_data _log_softmax _log_softmax_backward_data var std logcumsumexp count_nonzero"""
    ),
    "copies": _names(
        """clone copy _to_copy cat stack constant_pad_nd fill zero zeros ones full zeros_like ones_like full_like new_zeros new_ones
        new_full repeat select_backward slice_backward split_backward _foreach_copy roll flip tril triu scalar_tensor arange eye
        lift pin_memory _pin_memory"""
    ),
    "indexing": _names(
        "index index_put _index_put_impl embedding embedding_dense_backward gather scatter scatter_add index_select"
    ),
}
_FAMILY_OF = {name: family for family, names in _FAMILIES.items() for name in names}


class Kind(NamedTuple):
    """What is known of an operator without its arguments."""

    name: str
    kernels: int
    family: Family
    is_view: bool
    is_collective: bool
    waits: bool


def kind_of(func: Any) -> Kind:
    """The kind of an operator overload."""
    name, namespace = func._overloadpacket.__name__, func.namespace
    is_view = bool(func.is_view)
    counted = namespace == "aten" and not is_view and name not in _NOTHING
    kernels = _SEVERAL.get(name, 1) if counted else 0
    return Kind(name, kernels, _family(name), is_view, namespace == "c10d", name in WAITS)


def _family(name: str) -> Family:
    base = name.rstrip("_") if not name.startswith("_") else name
    if "dot_product" in base:
        return "attention"
    return _FAMILY_OF.get(base) or _FAMILY_OF.get(base.removesuffix("_")) or "pointwise"


def tensors_in(value: Any, found: list[Tensor]) -> list[Tensor]:
    """Append the tensors of an operator's arguments or results, which nest lists and tuples only."""
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            tensors_in(item, found)
    return found


def written_in_place(func: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """What an operator on lists writes over; it returns nothing. Of a copy the operand itself stands for it: it is not read."""
    if func._overloadpacket.__name__ in ("_foreach_copy_", "_foreach_zero_"):
        return []
    found: list[Tensor] = []
    for argument, value in zip(func._schema.arguments, args):
        # fused optimizers declare gradients as written: they are where a scale is given
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads":
            tensors_in(value, found)
    return found


def bytes_of(tensor: Tensor) -> int:
    """Bytes that reading or writing a tensor moves: an expanded dim is read once."""
    number = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride()):
        number *= size if stride else 1
    return number


def together(tensors: list[Tensor]) -> int:
    """Kernels of an operator on lists: one takes some 64 tensors, and 320 blocks of 64 Ki numbers (MultiTensorApply.cuh)."""
    return max(1, -(-len(tensors) // 128), -(-sum(x.numel() for x in tensors) // (2 * 320 << 16)))


def flops_of(func: Any, kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Floating-point operations of matrix products, solves and attention; 0 for all else."""
    if kind.family == "solves":
        return int(args[0].size(-1) * args[1].numel())  # half of the square is zero
    if kind.family == "attention":
        return _attention_flops(func, args, kwargs)
    if kind.family != "products":
        return 0
    packet = func._overloadpacket
    if packet not in flop_registry and kind.name.endswith("_"):
        packet = getattr(torch.ops.aten, kind.name.rstrip("_"), packet)  # PyTorch's table has no products in place
    if packet in flop_registry:
        with contextlib.suppress(Exception):  # its formulas refuse some shapes (empty batches)
            return int(flop_registry[packet](*args, **kwargs, out_val=out))
    return 0


def _attention_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Two products forward, five backward (scores again, and two gradients each); a causal mask leaves half."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
    query, key = given["query"], given["key"]
    products = 5 if "backward" in func._schema.name else 2
    whole = 2 * products * query.numel() * key.size(-2)
    return int(whole // 2 if given.get("is_causal") else whole)
