"""transformers' own model and configuration tests on the exported classes. `transformers_contract.py` runs this file."""

from __future__ import annotations

import json
import unittest
from typing import Any

import torch
from tests_of_transformers.test_configuration_common import ConfigTester
from tests_of_transformers.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from hope_megatron.convert.huggingface.model.configuration_hope import HopeConfig
from hope_megatron.convert.huggingface.model.modeling_hope import HopeForCausalLM, HopeModel
from hope_megatron.testing.models import tiny_model

# the tests look a class up by name to know what it needs, for example labels
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
    all_generative_model_classes = ()  # their tests are in no distribution; ours are tests/unit/convert/test_transformers.py
    has_attentions = False  # memories have no attention weights to return

    def setUp(self) -> None:
        self.model_tester = _Tester()
        architecture = self.model_tester.get_config().architecture
        self.config_tester = ConfigTester(self, config_class=HopeConfig, architecture=architecture)

    def test_config(self) -> None:
        """The configuration's own tests."""
        self.config_tester.run_common_tests()


del ModelTesterMixin  # or pytest would collect it
