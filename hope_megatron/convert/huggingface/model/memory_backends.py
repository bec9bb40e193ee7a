"""The backends of the memory operator that travel with an exported model, in the place of ops/memory/backends/installed.py."""

from hope_megatron.ops.memory.backends.autograd import AUTOGRAD
from hope_megatron.ops.memory.backends.manual.scan import MANUAL
from hope_megatron.ops.memory.backends.registry import Backend

BACKENDS: tuple[Backend, ...] = (MANUAL, AUTOGRAD)
