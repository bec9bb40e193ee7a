"""Optimizers that see whole matrices under ZeRO and tensor parallelism. See README.md in this folder."""

from hope_megatron.optim.base import BoundOptimizer, SharedSettings
from hope_megatron.optim.deep import DGD, DMGD, DeltaMomentum
from hope_megatron.optim.elementwise import SGD, AdamW
from hope_megatron.optim.errors import OptimError, UnboundShardError, ZeroLayoutError
from hope_megatron.optim.exchange import NewtonSchulz
from hope_megatron.optim.geometry import merge_shards, split_shards
from hope_megatron.optim.groups import build_param_groups
from hope_megatron.optim.m3 import M3
from hope_megatron.optim.muon import AdaMuon, Muon
from hope_megatron.optim.new_optimizer import build_optimizer
from hope_megatron.optim.schedule import apply_lr, lr_at
from hope_megatron.optim.tags import ParamTags, read_tags

__all__ = [
    "DGD",
    "DMGD",
    "M3",
    "SGD",
    "AdaMuon",
    "AdamW",
    "BoundOptimizer",
    "DeltaMomentum",
    "Muon",
    "NewtonSchulz",
    "OptimError",
    "ParamTags",
    "SharedSettings",
    "UnboundShardError",
    "ZeroLayoutError",
    "apply_lr",
    "build_optimizer",
    "build_param_groups",
    "lr_at",
    "merge_shards",
    "read_tags",
    "split_shards",
]
