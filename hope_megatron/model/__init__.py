"""The language model: embedding, layers, head, loss, and its streaming state."""

from hope_megatron.model.language_model import LanguageModel, ModelOutput
from hope_megatron.model.loss import IGNORE
from hope_megatron.model.new_model import build_model
from hope_megatron.model.state import ModelState

__all__ = ["IGNORE", "LanguageModel", "ModelOutput", "ModelState", "build_model"]
