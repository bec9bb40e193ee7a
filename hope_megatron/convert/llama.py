"""Llama, Mistral and Qwen checkpoints as Hope-Attention: attention is kept, each MLP becomes the initial state of levels.

Both models are the same function of the same numbers: RMSNorm before attention and before the MLP, rotary embeddings that
turn the two halves of a head, grouped queries, SwiGLU; Qwen2's biases and Qwen3's norms of queries and keys too. So a chain of
one level computes what the source computes. Further levels of the chain start with an output matrix of zeros, which adds nothing
until they learn (ad-hoc level stacking, "Nested Learning", arXiv 2512.24695, section 7.3). Or the MLP is cut into levels side by
side (eq. 74): an MLP is a sum over its hidden channels, so levels that share them out, joined with weights of 1, add up to it.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from hope_megatron.checkpoint.errors import ConversionError, ExportCheckError
from hope_megatron.checkpoint.local_model import load_weights
from hope_megatron.config import RunConfig
from hope_megatron.config.model import AttentionConfig, CMSConfig, CMSLevelConfig, ModelConfig
from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.convert.formats import Format
from hope_megatron.convert.huggingface.check import LOGIT_TOLERANCE
from hope_megatron.convert.huggingface.weights import read_json, read_weights
from hope_megatron.model import LanguageModel, build_model
from hope_megatron.parallel.distributed import init_distributed

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
NUM_CHECKED_TOKENS = 64

log = logging.getLogger(__name__)


def llama_model_config(directory: str | Path) -> ModelConfig:
    """The Hope-Attention with one level that computes what a Llama checkpoint computes.

    Raises:
        ConversionError: the checkpoint is of another family, or has a part that Hope-Attention does not have.
    """
    path = Path(directory) / "config.json"
    values = read_json(path)
    architecture = next(iter(values.get("architectures") or ["nothing"]))
    if architecture not in ARCHITECTURES:
        raise ConversionError(f"{path} is of {architecture}; {', '.join(ARCHITECTURES)} can be imported")
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise ConversionError(f"{path}: {name}={values[name]!r}; Hope-Attention has no such biases")
    if values.get("hidden_act", "silu") != "silu":
        raise ConversionError(f"{path}: hidden_act={values['hidden_act']!r}; the levels' SwiGLU has silu")
    try:
        width, num_heads = values["hidden_size"], values["num_attention_heads"]
        head_size, num_kv_heads = values.get("head_dim"), values.get("num_key_value_heads")
        return ModelConfig(
            name=values.get("model_type", "llama"),
            vocab_size=values["vocab_size"],
            num_layers=values["num_hidden_layers"],
            hidden_size=width,
            num_heads=num_heads,
            head_size=head_size if head_size != width // num_heads else None,
            layer_pattern=("attention",),
            attention=AttentionConfig(
                num_kv_heads=num_kv_heads if num_kv_heads != num_heads else None,
                rope_base=_rope_base(values, path),
                window_tokens=_window(values, path),
                qkv_bias=architecture.startswith("Qwen2"),
                qk_norm=architecture.startswith("Qwen3"),
            ),
            cms=CMSConfig(levels=(CMSLevelConfig(hidden_size=values["intermediate_size"]),), activation="swiglu"),
            norm_epsilon=values.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise ConversionError(f"{path} lacks {error.args[0]}") from None


def _window(values: dict[str, Any], path: Path) -> int | None:
    """The sliding window, if all layers have it; Qwen's files name one that is switched off."""
    window, layers = values.get("sliding_window"), values["num_hidden_layers"]
    if window is None or not values.get("use_sliding_window", not values["model_type"].startswith("qwen")):
        return None
    first = values.get("max_window_layers", 0)
    kinds = set(
        values.get("layer_types") or ["full_attention"] * min(first, layers) + ["sliding_attention"] * (layers - first)
    )
    if len(kinds) > 1:
        raise ConversionError(
            f"{path}: some layers have a sliding window and some have none; Hope-Attention has one kind"
        )
    return window if kinds == {"sliding_attention"} else None


def split_mlp(config: ModelConfig, sizes: Sequence[int]) -> ModelConfig:
    """The same model with its MLP cut into levels side by side, of these hidden sizes.

    Raises:
        ConversionError: the sizes do not add up to the MLP's.
    """
    (level,) = config.cms.levels
    if sum(sizes) != level.hidden_size or min(sizes) < 1:
        raise ConversionError(
            f"levels of {', '.join(map(str, sizes))} hidden channels add up to {sum(sizes)}; the MLP has {level.hidden_size}"
        )
    levels = tuple(CMSLevelConfig(hidden_size=size) for size in sizes)
    cms = CMSConfig(levels=levels, activation=config.cms.activation, connection="independent")
    return config.model_copy(update={"cms": cms})


def _rope_base(values: dict[str, Any], path: Path) -> float:
    """Base of the rotary embedding, where older and newer files keep it; scaled ones are refused."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConversionError(
            f"{path}: rotary embeddings of type {kind!r}: only unscaled ones of whole heads are supported"
        )
    return float(rope.get("rope_theta", values.get("rope_theta", 10_000.0)))


def import_llama(directory: str | Path, config: ModelConfig) -> LanguageModel:
    """The model of `config` with the weights of a Llama checkpoint in Hugging Face layout (safetensors only).

    Raises:
        ConversionError: the model of `config` does not begin as the source, or a tensor is missing or left over.
        ExportCheckError: it computes something else than transformers makes of the source, where that is installed.
    """
    directory = Path(directory)
    source = llama_model_config(directory)
    _check_fits(config, source, directory)
    mesh = init_distributed(ParallelConfig(), num_threads=torch.get_num_threads())
    model = build_model(config, dtype=torch.float32)
    tensors = _rename(dict(_read(directory)), config, directory)
    tensors |= _neutral_levels(model, tensors)
    load_weights(model, tensors.items(), str(directory))
    return model.to(mesh.device).eval()


def check_against_transformers(model: LanguageModel, directory: Path) -> float | None:
    """Largest difference between logits of `model` and of the source in transformers, float32, on arbitrary tokens.

    Returns:
        The difference; None if transformers is not installed.

    Raises:
        ExportCheckError: it is above LOGIT_TOLERANCE.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    name = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
    source = transformers.AutoModelForCausalLM.from_pretrained(
        directory, use_safetensors=True, **{name: torch.float32}
    ).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.model_config.vocab_size, (1, NUM_CHECKED_TOKENS), generator=generator)
    with torch.no_grad():
        expected = source(tokens).logits
        found = model(tokens.to(next(model.parameters()).device)).logits.float().cpu()
    difference = float((found - expected).abs().max())
    if not difference <= LOGIT_TOLERANCE:  # also when it is NaN
        raise ExportCheckError(
            f"the import was given up: logits differ by {difference:.1e} from those of {directory} in transformers, "
            f"allowed are {LOGIT_TOLERANCE:.0e}"
        )
    return difference


def _resolved(config: ModelConfig) -> dict[str, Any]:
    """What must be equal for the same weights to compute the same."""
    attention = config.attention
    return {
        "vocab_size": config.vocab_size,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_heads,
        "head_size": config.head_dim,
        "layer_pattern": sorted(set(config.mixers)),
        "attention.num_kv_heads": attention.num_kv_heads or config.num_heads,
        "attention.rope_base": attention.rope_base,
        "attention.window_tokens": attention.window_tokens,
        "attention.qkv_bias": attention.qkv_bias,
        "attention.qk_norm": attention.qk_norm,
        "cms.activation": config.cms.activation,
        "norm_epsilon": config.norm_epsilon,
        "tie_embeddings": config.tie_embeddings,
    }


def _check_fits(wanted: ModelConfig, source: ModelConfig, directory: Path) -> None:
    here, there = _resolved(wanted), _resolved(source)
    mlp = source.cms.levels[0].hidden_size
    if not _is_split(wanted, mlp):
        here["cms.levels[0].hidden_size"], there["cms.levels[0].hidden_size"] = wanted.cms.levels[0].hidden_size, mlp
    lines = [f"\n  model.{key}: {there[key]} there, {here[key]} in the run" for key in there if there[key] != here[key]]
    if lines:
        raise ConversionError(
            f"{directory} is another model than the run's:{''.join(lines)}\n"
            f"`hope import llama {directory} --model FILE` writes the model section that fits"
        )


def _is_split(config: ModelConfig, hidden_size: int) -> bool:
    """Whether levels side by side share out an MLP of that size."""
    sizes = [level.hidden_size for level in config.cms.levels]
    return config.cms.connection == "independent" and sizes[0] < hidden_size == sum(sizes)


def _read(directory: Path) -> list[tuple[str, Tensor]]:
    """The weights; older files also hold the rotary frequencies, which follow from the base."""
    return [
        (name, tensor.float()) for name, tensor in read_weights(directory) if not name.endswith("rotary_emb.inv_freq")
    ]


def _rename(tensors: dict[str, Tensor], config: ModelConfig, directory: Path) -> dict[str, Tensor]:
    """Llama's weights under our names and in our layout; what is left in `tensors` keeps its name, for load_weights to name."""

    def take(name: str) -> Tensor:
        if name not in tensors:
            raise ConversionError(f"{directory} lacks the tensor {name}, which its config.json asks for")
        return tensors.pop(name)

    found = {
        "embedding.weight": _pad_rows(take("model.embed_tokens.weight"), config.padded_vocab_size),
        "norm.weight": take("model.norm.weight"),
    }
    if config.tie_embeddings:
        tensors.pop("lm_head.weight", None)  # some files repeat the embedding
    else:
        found["head.weight"] = _pad_rows(take("lm_head.weight"), config.padded_vocab_size)
    for i in range(config.num_layers):
        old, new = f"model.layers.{i}", f"layers.{i}"
        q, k, v = (take(f"{old}.self_attn.{part}_proj.weight") for part in "qkv")
        groups = config.attention.num_kv_heads or config.num_heads
        found |= {
            f"{new}.norm.weight": take(f"{old}.input_layernorm.weight"),
            f"{new}.mixer.attention.linear_qkv.weight": _fuse_qkv(q, k, v, groups),
            f"{new}.mixer.attention.linear_proj.weight": take(f"{old}.self_attn.o_proj.weight"),
        }
        if config.attention.qkv_bias:
            q, k, v = (take(f"{old}.self_attn.{part}_proj.bias").unsqueeze(1) for part in "qkv")
            found[f"{new}.mixer.attention.linear_qkv.bias"] = _fuse_qkv(q, k, v, groups).squeeze(1)
        if config.attention.qk_norm:
            for part in "qk":
                found[f"{new}.mixer.attention.{part}_layernorm.weight"] = take(f"{old}.self_attn.{part}_norm.weight")
        norm = take(f"{old}.post_attention_layernorm.weight")
        gate, up, down = (take(f"{old}.mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
        found |= {f"{new}.mlp.{key}": tensor for key, tensor in _levels(norm, gate, up, down, config)}
    return found | tensors


def _levels(norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The MLP as the first level of a chain, or its hidden channels [h, D] shared out over levels side by side."""
    split = _is_split(config, gate.size(0))
    sizes = [level.hidden_size for level in config.cms.levels] if split else [gate.size(0)]
    parts = zip(gate.split(sizes), up.split(sizes), down.split(sizes, 1), strict=True)
    for i, (gate_part, up_part, down_part) in enumerate(parts):
        yield f"levels.{i}.norm.weight", norm.clone()
        yield f"levels.{i}.up.weight", torch.cat([gate_part, up_part])
        yield f"levels.{i}.down.weight", down_part


def _neutral_levels(model: LanguageModel, taken: Container[str]) -> dict[str, Tensor]:
    """Levels that got nothing of the source as they were initialised, but with nothing to add yet; joins of ones."""
    return {
        name: torch.zeros_like(parameter) if name.endswith("down.weight") else parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name not in taken and (".mlp.levels." in name or name.endswith(".mlp.join"))
    }


def _pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """Zeros for the rows that pad the vocabulary."""
    return torch.cat([tensor, tensor.new_zeros(rows - tensor.size(0), tensor.size(1))])


def _fuse_qkv(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """Megatron-Core's layout: for each key-value head its query heads, its key and its value. [(heads + 2 groups) * d, D]."""
    parts = [part.view(groups, -1, q.size(1)) for part in (q, k, v)]
    return torch.cat(parts, 1).view(-1, q.size(1))


def _load_model(source: Path, config: RunConfig) -> LanguageModel:
    model = import_llama(source, config.model)
    difference = check_against_transformers(model, source)
    if difference is None:
        log.warning("transformers is not installed: the logits were not compared with those of %s", source)
    else:
        log.info("checked: logits differ by at most %.1e from those of %s in transformers", difference, source)
    return model


FORMAT = Format(load_model=_load_model, read_model_config=llama_model_config, split_mlp=split_mlp)
