"""Parameters of any model, sorted into what is orthogonalised and what is not.

What a parameter or its module says about itself comes first (tags.py; attributes `optim_roles`, `optim_no_decay`,
`update_period_steps` of modules). Then its module's class, its name, and last its shape decide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torch import nn

from hope_megatron.optim.errors import OptimError
from hope_megatron.optim.groups import build_param_groups

_VOCABULARY = re.compile(r"(wte|wpe|\w*emb(ed|edding|eddings)?|embed_\w+|unembed|lm_head|output_head|head|classifier)")
"""A part of a name that says: rows or columns belong to tokens, positions or classes."""

LARGEST_RATIO = 16
"""Of a nameless matrix: with longer sides than this it is taken for an embedding or a head."""

_LOOKUPS = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)


def sorted_groups(params: Any, *, lr: float, vector_lr: float | None, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for the optimizers of this package.

    Args:
        params: a module, which is sorted best; named parameters; parameters; or groups as torch's optimizers take them, whose
            other keys ("lr", "weight_decay", "update_period_steps", "role") win for their parameters. Groups of
            `build_param_groups` stay as they are.
        lr: rate of matrices; `vector_lr` that of everything else, None: the same.
        weight_decay: of what has two dimensions or more.

    Raises:
        OptimError: nothing to train, or something else was given.
    """
    settings = SimpleNamespace(lr=lr, vector_lr=vector_lr, weight_decay=weight_decay)
    if isinstance(params, nn.Module):
        tag_module(params)
        return build_param_groups(params.named_parameters(), settings)
    items = list(params)
    if not items:
        raise OptimError("the optimizer got no parameters")
    if all(isinstance(item, Mapping) for item in items):
        return [
            group
            for number, item in enumerate(items)
            for group in _user_group(dict(item), number, len(items), settings)
        ]
    return build_param_groups(_named(items), settings)


def _user_group(group: dict[str, Any], number: int, count: int, settings: SimpleNamespace) -> Iterator[dict[str, Any]]:
    """One group as a user wrote it; two or more of ours, for matrices and vectors."""
    if "role" in group and "name" in group and "update_period_steps" in group:
        yield group
        return
    members = group.pop("params")
    members = [members] if isinstance(members, nn.Parameter) else list(members)
    named = list(_named(members, f"{number}."))
    role, period = group.pop("role", None), group.pop("update_period_steps", None)
    for _, param in named:
        if role is not None:
            param.optim_role = role  # type: ignore[attr-defined]
        if period is not None:
            param.update_period_steps = period  # type: ignore[attr-defined]
    if "lr" in group:
        group.setdefault("vector_lr", None)  # the group's rate is for all in it
    own = {name: group.pop(name, getattr(settings, name)) for name in vars(settings)}
    label = group.pop("name", f"group_{number}" if count > 1 else None)
    for made in build_param_groups(named, SimpleNamespace(**own)):
        yield {**group, **made, "name": made["name"] if label is None else f"{label}/{made['name']}"}


def _named(items: Iterable[Any], prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters; a parameter without a name gets its number, and is sorted by its shape."""
    for number, item in enumerate(items):
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
            name, param = item
            _suggest(param, "vector" if any(map(_VOCABULARY.fullmatch, name.split("."))) else _by_dimensions(param))
        elif isinstance(item, nn.Parameter):
            name, param = f"{prefix}{number:06d}", item
            if getattr(param, "optim_name", None) is not None:
                name = param.optim_name  # type: ignore[attr-defined]
            _suggest(param, _by_shape(param))
        else:
            raise OptimError(
                f"the optimizer takes a module, parameters, named parameters or groups of them, not {type(item).__name__}"
            )
        yield name, param


def tag_module(model: nn.Module) -> None:
    """Note on every parameter of a model what its modules and their classes say."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for path, module in model.named_modules():
        period = getattr(module, "update_period_steps", None)
        if isinstance(period, int):
            for param in module.parameters():
                param.update_period_steps = period  # type: ignore[attr-defined]
                param.update_period_changes = getattr(module, "update_period_changes", ())  # type: ignore[attr-defined]
        lookup = isinstance(module, _LOOKUPS) or module is head
        lookup |= any(map(_VOCABULARY.fullmatch, path.split("."))) and not list(module.children())
        for name, param in module.named_parameters(recurse=False):
            said = getattr(module, "optim_roles", {}).get(name)
            _suggest(param, said or ("vector" if lookup or id(param) in embeddings else _by_dimensions(param)))
            if getattr(module, "optim_no_decay", False):
                param.no_weight_decay = True  # type: ignore[attr-defined]
        _tag_fused(module)


def _tag_fused(module: nn.Module) -> None:
    """Matrices that stand one above the other in one weight are orthogonalised apart."""
    parts = getattr(module, "optim_fused_parts", ())
    if parts and isinstance(module, nn.Linear):
        module.weight.optim_fused_parts = parts
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        module.in_proj_weight.optim_fused_parts = (module.embed_dim,) * 3  # type: ignore[attr-defined]


def _suggest(param: nn.Parameter, role: str) -> None:
    """What a layer or a user said stands; what an earlier optimizer was told here does not."""
    if getattr(param, "optim_role", None) is None or getattr(param, "optim_role_guessed", False):
        param.optim_role, param.optim_role_guessed = role, True  # type: ignore[attr-defined]


def _by_dimensions(param: nn.Parameter) -> str:
    return "matrix" if param.dim() == 2 and min(param.shape) > 1 else "vector"


def _by_shape(param: nn.Parameter) -> str:
    too_long = param.dim() == 2 and max(param.shape) > LARGEST_RATIO * min(param.shape)
    return "vector" if too_long else _by_dimensions(param)
