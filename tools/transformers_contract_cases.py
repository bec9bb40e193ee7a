"""transformers' own tests on the exported classes. `transformers_contract.py` runs this file."""

from __future__ import annotations

import json
import unittest
from typing import Any

import pytest
import torch
import transformers
from tests_of_transformers.generation.test_utils import GenerationTesterMixin
from tests_of_transformers.test_configuration_common import ConfigTester
from tests_of_transformers.test_modeling_common import ModelTesterMixin, ids_tensor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast, TextGenerationPipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from hope_megatron.convert.huggingface.model.cache_hope import HopeCache, map_tensors
from hope_megatron.convert.huggingface.model.configuration_hope import HopeConfig
from hope_megatron.convert.huggingface.model.modeling_hope import HopeForCausalLM, HopeModel
from hope_megatron.testing.models import tiny_model

# the tests look a class up by name to know what it needs, for example labels
AutoConfig.register("hope", HopeConfig)
AutoModel.register(HopeConfig, HopeModel)
AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM)
MODEL_MAPPING_NAMES["hope"], MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["hope"] = "HopeModel", "HopeForCausalLM"


class _Tester:
    """What the mixin asks about a small model."""

    batch_size, seq_length, hidden_size, num_hidden_layers, is_training = 3, 9, 32, 2, True

    def get_config(self) -> HopeConfig:
        architecture = json.loads(tiny_model(vocab_size=96).model_dump_json())
        return HopeConfig(architecture=architecture, eos_token_id=2, pad_token_id=3, bos_token_id=1)

    def prepare_config_and_inputs_for_common(self) -> tuple[HopeConfig, dict[str, Any]]:
        ids = ids_tensor([self.batch_size, self.seq_length], 96)
        return self.get_config(), {"input_ids": ids.masked_fill(ids == 3, 4), "attention_mask": torch.ones_like(ids)}


class HopeContract(ModelTesterMixin, unittest.TestCase):
    """Every test of ModelTesterMixin."""

    all_model_classes = (HopeModel, HopeForCausalLM)
    all_generative_model_classes = ()  # the class below has their tests
    has_attentions = False  # memories have no attention weights to return
    test_pruning = test_head_masking = False  # transformers 4: of attention heads

    def setUp(self) -> None:
        self.model_tester = _Tester()
        architecture = self.model_tester.get_config().architecture
        self.config_tester = ConfigTester(self, config_class=HopeConfig, architecture=architecture)

    def test_config(self) -> None:
        """The configuration's own tests."""
        self.config_tester.run_common_tests()

    if transformers.__version__.startswith("4."):

        @unittest.skip(
            "sets `*_range` of the configuration to 0 and expects weights of 0 or 1; the architecture has init_std"
        )
        def test_initialization(self) -> None: ...


@pytest.mark.skipif(not hasattr(GenerationTesterMixin, "test_greedy_generate"), reason="given with --tests only")
class HopeGenerationContract(GenerationTesterMixin, unittest.TestCase):
    """Every test of GenerationTesterMixin."""

    all_model_classes = all_generative_model_classes = (HopeForCausalLM,)
    has_attentions = False

    def setUp(self) -> None:
        self.model_tester = _Tester()

    # where other models have keys and values there is a state of its own kind, of one size

    def _check_past_key_values_for_generate(self, batch_size: int, *cache: Any, **named: Any) -> None:
        found = cache[0] if cache else named.get("past_key_values", named.get("decoder_past_key_values"))
        self.assertIsInstance(found, HopeCache)
        self.assertEqual(found.batch_size, batch_size)

    def _check_caches_are_equal(self, one: Any, other: Any) -> None:
        map_tensors(lambda a, b: torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5), one.layers, other.layers)
        self.assertTrue(bool((torch.as_tensor(one.position) == torch.as_tensor(other.position)).all()))


class HopePipelines(unittest.TestCase):
    """The pipeline that continues texts, with bytes for tokens."""

    def test_text_generation(self) -> None:
        """What transformers asks of every model's pipeline."""
        given = pytest.importorskip(
            "tests_of_transformers.pipelines.test_pipelines_text_generation", reason="given with --tests only"
        )
        architecture = json.loads(tiny_model(vocab_size=259).model_dump_json())
        model = HopeForCausalLM(HopeConfig(architecture=architecture, eos_token_id=2, pad_token_id=3, bos_token_id=1))
        specials = {"unk_token": "<0>", "bos_token": "<1>", "eos_token": "<2>"}
        words = [*specials.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
        bytes_only = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
        bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bytes_only.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, **specials)
        pipe = TextGenerationPipeline(model=model, tokenizer=tokenizer, max_new_tokens=5)
        given.TextGenerationPipelineTests().run_pipeline_test(pipe, None)


del ModelTesterMixin, GenerationTesterMixin  # or pytest would collect them
