"""Every backend of the memory operator, best first. An exported model has a list of its own (convert/huggingface/model)."""

from hope_megatron.ops.memory.backends.autograd import AUTOGRAD
from hope_megatron.ops.memory.backends.cpu.scan import CPU
from hope_megatron.ops.memory.backends.manual.scan import MANUAL
from hope_megatron.ops.memory.backends.phases.scan import PHASES
from hope_megatron.ops.memory.backends.registry import Backend
from hope_megatron.ops.memory.backends.triton.backend import TRITON

BACKENDS: tuple[Backend, ...] = (CPU, TRITON, PHASES, MANUAL, AUTOGRAD)
