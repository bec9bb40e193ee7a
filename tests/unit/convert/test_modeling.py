"""The modelling code that travels with a model computes what the project's own model computes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.tokenizer import Tokenizer
from hope_megatron.checkpoint.find import CheckpointSource
from hope_megatron.config import AttentionConfig, CMSConfig, CMSLevelConfig, MemoryConfig, ModelConfig, ParallelConfig
from hope_megatron.config.model import MupConfig
from hope_megatron.convert.huggingface.export import export_huggingface
from hope_megatron.convert.huggingface.modeling_files import modeling_files
from hope_megatron.convert.huggingface.names import to_transformers
from hope_megatron.model import build_model
from hope_megatron.parallel.distributed import init_distributed
from hope_megatron.testing.models import tiny_model

transformers = pytest.importorskip("transformers", reason="the exported modelling code needs transformers")

STATIC = {f"adaptive_{name}": False for name in ("key", "value", "eta", "alpha")}
VARIANTS = {
    "hope": {},
    "all rates from the token": {"memory": MemoryConfig(chunk_tokens=8, self_chunk_tokens=4, momentum="data")},
    "constant rates, gate": {
        "memory": MemoryConfig(chunk_tokens=8, decay="constant", momentum="constant", output_gate="silu", conv_width=1),
        "tie_embeddings": False,
    },
    "some adaptive": {"memory": MemoryConfig(chunk_tokens=8, adaptive_key=False, adaptive_alpha=False, read_skip=True)},
    "W1 alone written": {"memory": MemoryConfig(chunk_tokens=8, written_layers="output")},
    "titans": {"memory": MemoryConfig(chunk_tokens=8, hidden_size=12, own_targets=False, **STATIC)},
    "deltanet": {"memory": MemoryConfig(chunk_tokens=8, num_layers=1, decay="none", own_targets=False, **STATIC)},
    "retnet": {"memory": MemoryConfig(chunk_tokens=8, num_layers=1, decay="retnet", own_targets=False, **STATIC)},
    "softmax weights": {
        "memory": MemoryConfig(
            chunk_tokens=4, objective="l2", weights="softmax", dgd_layers="none", own_targets=False, **STATIC
        )
    },
    "rates of channels": {
        "memory": MemoryConfig(
            chunk_tokens=8, num_layers=1, rates_of="channel", decay_to="zero", own_targets=False, **STATIC
        )
    },
    "fixed rate": {
        "memory": MemoryConfig(
            chunk_tokens=8, num_layers=1, eta="fixed", eta_max=0.5, decay="none", own_targets=False, **STATIC
        )
    },
    "muP": {"mup": MupConfig(base_width=12)},
    "attention": {"layer_pattern": ("attention",), "head_size": 6},
    "levels side by side, learned inner rate": {
        "cms": CMSConfig(
            levels=(
                CMSLevelConfig(hidden_size=16, inner_chunk_tokens=4, inner_rate=0.1, inner_rate_kind="per_channel"),
                CMSLevelConfig(hidden_size=8),
            ),
            connection="independent",
        )
    },
    "window": {
        "layer_pattern": ("memory", "attention"),
        "attention": AttentionConfig(num_kv_heads=1, window_tokens=5, rope_base=500.0),
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_streaming_equal_the_projects_model(name: str) -> None:
    from hope_megatron.convert.huggingface.model.configuration_hope import HopeConfig
    from hope_megatron.convert.huggingface.model.modeling_hope import HopeForCausalLM

    config = tiny_model(**VARIANTS[name])
    init_distributed(ParallelConfig())
    ours = build_model(config, seed=1).eval()
    for parameter in ours.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3.0)
    theirs = HopeForCausalLM(HopeConfig(architecture=_as_json(config))).eval()
    weights = dict(to_transformers(ours.named_parameters(), config))
    if config.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embedding.weight"]
    theirs.load_state_dict(weights, strict=True)
    tokens = torch.randint(config.vocab_size, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours(tokens).logits
        torch.testing.assert_close(theirs(tokens).logits, expected, atol=1e-5, rtol=0)
        state, pieces = None, []
        for piece in tokens.split((10, 1, 1, 9), dim=1):
            output = theirs(piece, state=state)
            state = output.state
            pieces.append(output.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-5, rtol=0)


def _as_json(config: ModelConfig) -> dict:
    return json.loads(config.model_dump_json())


def test_the_operator_travels_whole_and_names_nothing_of_ours() -> None:
    files = modeling_files()
    assert "hope_memory_chunk.py" in files and "hope_short_conv.py" in files
    for name, text in files.items():
        compile(text, name, "exec")
        assert "import hope_megatron" not in text and "from hope_megatron" not in text


SAMPLE = "  def f(x):\n\treturn '</s> <unk>' , é 12  "

SCRIPT = """
import sys
sys.modules["hope_megatron"] = sys.modules["data_pipeline"] = None  # importing either would fail
import json, torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

directory, probe, sample = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
ids = tokenizer(sample, add_special_tokens=False)["input_ids"]
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
probe = load_file(probe)
tokens, expected = probe["tokens"], probe["logits"]
with torch.no_grad():
    output = model(tokens, labels=tokens)
difference = (output.logits - expected).abs().max().item()
loss = torch.nn.functional.cross_entropy(expected[0, :-1], tokens[0, 1:]).item()
prompt = tokens[:, :9]
text = prompt
with torch.no_grad():
    for _ in range(12):
        text = torch.cat((text, model(text).logits[:, -1:].argmax(-1)), 1)
plain = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
refused = []
for bad in ({"attention_mask": torch.tensor([[1, 0] + [1] * 7])}, {"cache_implementation": "static"}):
    try:
        model.generate(prompt, max_new_tokens=2, **bad)
    except ValueError as error:
        refused.append(str(error))
print(json.dumps({
    "difference": difference, "loss": abs(output.loss.item() - loss), "same": torch.equal(plain, text), "refused": refused,
    "ids": ids, "decoded": tokenizer.decode(ids), "eos": tokenizer.eos_token_id,
    "model_type": AutoConfig.from_pretrained(directory, trust_remote_code=True).model_type,
}))
"""


def test_plain_transformers_loads_and_generates_without_this_project(
    make_checkpoint: Callable[..., CheckpointSource], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = make_checkpoint()
    export_huggingface(source, tmp_path / "model", tokenizer)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "model"), str(source.path / "probe.safetensors"), SAMPLE],
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["difference"] <= 1e-4 and found["loss"] < 1e-5
    assert found["same"] and found["model_type"] == "hope"
    assert found["ids"] == tokenizer.encode(SAMPLE).tolist() and found["decoded"] == SAMPLE
    assert found["eos"] == tokenizer.eos_id
    assert "zeros between the tokens of row 0" in found["refused"][0] and "a state of its own" in found["refused"][1]
