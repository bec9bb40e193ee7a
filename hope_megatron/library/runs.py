"""Models of runs and exports, from Python: weights, a PyTorch model, text, scores.

`reference` is what commands take: a run directory (its newest good checkpoint), RUN@STEP, a checkpoint, with :ema its averaged
weights; or the directory of an export.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from data_pipeline.tokenizer import Tokenizer
    from hope_megatron.config.model import ModelConfig
    from hope_megatron.convert.huggingface.model.modeling_hope import HopeForCausalLM


class Run:
    """A trained model by its reference. Nothing is read before it is asked for.

    Args:
        reference: see the module docstring.
        tokenizer: file of a SentencePiece model; None means the one that the model was trained with.
        device, dtype: of `model`.
    """

    def __init__(
        self,
        reference: str | Path,
        *,
        tokenizer: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.reference = str(reference)
        self.device, self.dtype = torch.device(device), dtype
        self._tokenizer_file = tokenizer

    @cached_property
    def config(self) -> ModelConfig:
        """The architecture."""
        from hope_megatron.convert.huggingface.export import read_config

        return read_config(Path(self.reference)) if self._exported else self._source.config.model

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""
        from data_pipeline.open_tokenizer import load_tokenizer, make_tokenizer
        from hope_megatron.convert.huggingface.tokenizer_back import read_tokenizer

        if self._tokenizer_file is not None:
            return load_tokenizer(self._tokenizer_file)
        if self._exported:
            directory = Path(self.reference)
            return make_tokenizer(
                read_tokenizer(directory), f"the tokenizer of {directory}", directory / "tokenizer.json"
            )
        return load_tokenizer(self._source.config.data.tokenizer)

    @property
    def window_tokens(self) -> int:
        """Sequence length in training; no limit to what can be read."""
        if not self._exported:
            return self._source.config.training.seq_length
        from hope_megatron.convert.huggingface.weights import read_json

        return int(read_json(Path(self.reference) / "config.json").get("train_tokens_per_sequence") or 0)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, whole, float32, one at a time; digests are verified first. Names are those of a checkpoint."""
        from hope_megatron.convert.huggingface.digests import verify_digests
        from hope_megatron.convert.huggingface.names import from_transformers
        from hope_megatron.convert.huggingface.weights import read_weights

        if not self._exported:
            yield from self._source.tensors()
            return
        directory = Path(self.reference)
        verify_digests(directory)
        for name, tensor in from_transformers(read_weights(directory), self.config):
            yield name, tensor.float()

    @cached_property
    def model(self) -> HopeForCausalLM:
        """A plain PyTorch model of one device, in eval mode. CMS levels are static, as in an export."""
        from hope_megatron.convert.huggingface.names import to_transformers
        from hope_megatron.library.causal_lm import HopeConfig, HopeForCausalLM

        tokenizer, config = self.tokenizer, self.config
        ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        model = HopeForCausalLM(
            HopeConfig(
                config.model_dump(mode="json"),
                train_tokens_per_sequence=self.window_tokens,
                **ids,
                bos_token_id=tokenizer.bos_id if tokenizer.bos_id >= 0 else None,
            )
        )
        weights = dict(to_transformers(self.weights(), config))
        if config.tie_embeddings:
            weights["lm_head.weight"] = weights["model.embedding.weight"]
        model.load_state_dict(weights, strict=True)
        return model.to(self.device, self.dtype).eval()

    @cached_property
    def _exported(self) -> bool:
        from hope_megatron.convert.huggingface.export import is_huggingface_model

        return is_huggingface_model(self.reference)

    @cached_property
    def _source(self) -> Any:
        from hope_megatron.checkpoint.find import find_checkpoint

        return find_checkpoint(self.reference)


def load_weights(reference: str | Path) -> dict[str, Tensor]:
    """Every parameter of a run or export by its name in a checkpoint: whole, float32, on the CPU, digests verified.

    `{n.removeprefix("layers.0.mixer."): w ...}` loads into a `NeuralMemory`, `layers.0.` into a `HopeBlock`.

    Raises:
        ConversionError: there is no such model. CheckpointDamagedError: it is damaged.
    """
    return dict(Run(reference).weights())


def load_model(
    reference: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> HopeForCausalLM:
    """The model of a run or export as a transformers model in this process, in eval mode: `Run(reference).model`."""
    return Run(reference, device=device, dtype=dtype).model


@torch.no_grad()
def generate(
    run: Run | str | Path,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 0.95,
    seed: int = 0,
) -> list[str]:
    """Continue prompts, each as if it stood alone; a continuation ends with its document.

    Args:
        run: give a `Run` to load it once for many calls.
        temperature, top_k, top_p: as for `hope generate`; temperature 0 takes the most likely token.
        seed: the same seed draws the same texts for the same prompts.

    Returns:
        The continuations without the prompts, in order.
    """
    from hope_megatron.generation.sampling import SamplingOptions, sample

    run = run if isinstance(run, Run) else Run(run)
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        return []
    tokenizer, model = run.tokenizer, run.model
    rng = torch.Generator(run.device).manual_seed(seed)
    ids, mask = _padded([[tokenizer.eos_id, *tokenizer.encode(text).tolist()] for text in texts], tokenizer.eos_id)
    output = model(ids.to(run.device), attention_mask=mask.to(run.device), use_cache=True)
    logits = output.logits[torch.arange(len(texts)), mask.sum(1).to(run.device) - 1]
    rows: list[list[int]] = [[] for _ in texts]
    running = set(range(len(texts)))
    for _ in range(max_new_tokens):
        tokens = sample(logits, options, rng)
        for row in sorted(running):
            if (token := int(tokens[row])) == tokenizer.eos_id:
                running.discard(row)
            else:
                rows[row].append(token)
        if not running:
            break
        output = model(tokens.unsqueeze(1), state=output.state, use_cache=True)
        logits = output.logits[:, -1]
    return [tokenizer.decode(row) for row in rows]


def _padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] with padding behind, and the mask of what is no padding."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def evaluate(
    reference: str | Path,
    *,
    text: Sequence[str | Path] | None = None,
    data: str | Path | None = None,
    max_tokens: int | None = None,
    context_tokens: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Held-out scores, as `hope eval` computes them; on the run's own held-out split unless `text` or `data` is given.

    Args:
        text: UTF-8 files.
        data: manifest of token shards.
        max_tokens: score at most this many.
        context_tokens: length of the rows that are read; None means as in training.

    Returns:
        {"loss": nats per token, "perplexity": ..., "bits_per_byte": ..., "tokens": ..., ...}
    """
    from hope_megatron.convert.open_model import open_model
    from hope_megatron.eval.evaluate import evaluate as evaluate_opened
    from hope_megatron.eval.heldout import heldout_tokens

    opened = open_model(str(reference))
    files = [Path(file) for file in text] if text is not None else None
    tokens = heldout_tokens(opened, files, data, max_tokens)
    result = evaluate_opened(opened, tokens, context_tokens or opened.window_tokens, batch_size=batch_size)
    return {**result["scores"]["model"], "tokens": result["tokens"], "context_tokens": result["context_tokens"]}
