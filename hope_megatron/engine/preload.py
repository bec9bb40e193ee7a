"""Imported for its effect, before ranks are forked: DeepSpeed, as the engine configures it."""

from hope_megatron.engine.deepspeed_setup import import_deepspeed

import_deepspeed()
