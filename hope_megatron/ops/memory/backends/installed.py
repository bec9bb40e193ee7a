"""Every backend of the memory operator, best first. An exported model has a list of its own (convert/huggingface/model)."""

from hope_megatron.ops.memory.backends.autograd import AUTOGRAD
from hope_megatron.ops.memory.backends.cpu.scan import CPU
from hope_megatron.ops.memory.backends.manual.scan import MANUAL
from hope_megatron.ops.memory.backends.phases.scan import PHASES
from hope_megatron.ops.memory.backends.registry import Backend

BACKENDS: tuple[Backend, ...] = (CPU, PHASES, MANUAL, AUTOGRAD)
