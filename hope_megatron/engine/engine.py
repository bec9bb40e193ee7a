"""One engine: a model on Megatron-Core's groups, trained by DeepSpeed ZeRO with our optimizers, on gloo or NCCL alike."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hope_megatron.config.run import RunConfig
from hope_megatron.engine.control import ControlGroup
from hope_megatron.engine.deepspeed_setup import initialize
from hope_megatron.engine.distributed import Mesh
from hope_megatron.engine.sequence_parallel import reduce_sequence_parallel_gradients
from hope_megatron.model import IGNORE
from hope_megatron.optim import BoundOptimizer, apply_lr
from hope_megatron.optim.geometry import full_shape


class NonFiniteError(Exception):
    """A loss or gradient is NaN or infinite. It is raised on all ranks together, before any parameter has changed."""

    is_user_error = True


class Engine:
    """Forward, backward and step of one run.

    Attributes:
        model: the language model (DeepSpeed casts it to the compute precision, ZeRO-3 partitions it).
        optimizer: our optimizer, which sees the flat fp32 vectors of ZeRO.
        zero: DeepSpeed's wrapper around it; the optimizer itself at ZeRO stage 0.
        mesh: this process's place.
        control: agreements between all ranks.
        accumulation_steps: forward-backward passes per step.
    """

    def __init__(self, model: nn.Module, optimizer: BoundOptimizer, config: RunConfig, mesh: Mesh) -> None:
        self.config = config
        self.mesh = mesh
        self.control = ControlGroup()
        self.model = model
        self.optimizer = optimizer
        self.accumulation_steps = config.accumulation_steps(mesh.world_size)
        self._learns = config.model.cms.learns_in_context
        reduce_sequence_parallel_gradients(model, mesh.tp_group)
        self._deepspeed = initialize(model, optimizer, config, mesh)
        self.zero = self._deepspeed.optimizer
        self._passes = 0

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the whole model, each counted once."""
        tp_size = self.mesh.tp_size
        layouts = (param for bound in self.optimizer.bound_vectors() for param in bound.params)
        return sum(math.prod(full_shape(param.shape, param.tags, tp_size)) for param in layouts)

    def forward_backward(
        self, tokens: Tensor, targets: Tensor, global_valid_tokens: Tensor | int, documents: Tensor | None = None
    ) -> Tensor:
        """Accumulate the gradient of one micro-batch's share of the mean loss over the global batch.

        Under `training.truncate_tokens` the sequences are read window after window, each with a backward pass of its own and
        the state carried on. A model with inner clocks learns in context as it reads.

        DeepSpeed averages gradients over data parallelism, so the sum of losses is multiplied by that size first: after
        `accumulation_steps` calls the gradient is that of (sum of losses over the global batch) / global_valid_tokens,
        however the valid tokens are spread.

        Args:
            tokens: [B, T] int64.
            targets: [B, T] int64; -100 does not count.
            global_valid_tokens: targets other than -100 in the global batch, over all ranks and accumulation steps.
            documents: see `LanguageModel.forward`.

        Returns:
            Sum of this micro-batch's losses, on the device, detached.
        """
        self._passes += 1
        window = self.config.training.truncate_tokens or tokens.size(1)
        windows = list(zip(tokens.split(window, 1), targets.split(window, 1), strict=True))
        state, total = None, torch.zeros((), device=self.mesh.device)
        for i, (x, y) in enumerate(windows):
            last = i == len(windows) - 1
            self._deepspeed.set_gradient_accumulation_boundary(last and self._passes == self.accumulation_steps)
            output = self._deepspeed(x, y, state, documents=documents, return_state=not last, learn=self._learns)
            loss_sum = output.losses.sum()
            self._deepspeed.backward(loss_sum * (self.mesh.dp_size / global_valid_tokens), scale_wrt_gas=False)
            total += loss_sum.detach()
            state = output.state.detach() if output.state is not None else None
        return total

    def step(self, lr_multiplier: float = 1.0) -> float:
        """Clip and update with the accumulated gradients.

        Args:
            lr_multiplier: what the schedule makes of every group's base learning rate.

        Returns:
            Global gradient norm before clipping, each parameter counted once.

        Raises:
            NonFiniteError: on all ranks, with parameters and optimizer state untouched.
        """
        if self._passes != self.accumulation_steps:
            raise RuntimeError(f"step() after {self._passes} of {self.accumulation_steps} forward_backward() calls")
        self._passes = 0
        apply_lr(self.optimizer, lr_multiplier)
        if self.config.parallel.zero_stage == 0:
            norm = self._clip_gradients(self.config.optim.grad_clip)
            self._deepspeed.step()
            return norm
        self._deepspeed.step()
        if self.zero.overflow:
            raise NonFiniteError("the gradient norm is NaN or infinite, though the loss is finite")
        return float(self.zero._global_grad_norm)

    def check_finite(self, loss_sum: Tensor) -> None:
        """Stop all ranks together if the loss of any is not finite.

        Raises:
            NonFiniteError: on all ranks, naming those concerned.
        """
        bad = not bool(torch.isfinite(loss_sum))
        if self.control.maximum([bad])[0]:
            ranks = [rank for rank, is_bad in enumerate(self.control.gather(bad)) if is_bad]
            raise NonFiniteError(f"the loss is NaN or infinite on rank {', '.join(map(str, ranks))}")

    @torch.no_grad()
    def evaluate(
        self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None, *, learn: bool = True
    ) -> Tensor:
        """Sum of losses and number of valid tokens of a batch, over the data-parallel ranks. A model with inner clocks
        learns in context, as it does in training.

        Args:
            tokens: [B, T] int64, different on each data-parallel rank; all ranks call together.
            targets: [B, T] int64; -100 does not count.
            documents: see `LanguageModel.forward`.
            learn: False reads with static levels, in one piece.

        Returns:
            [2] float64 on the device: sum of losses, number of valid tokens.
        """
        self.model.eval()
        losses = self.model(tokens, targets, documents=documents, learn=learn and self._learns).losses
        self.model.train()
        sums = torch.stack([losses.double().sum(), (targets != IGNORE).sum().double()])
        dist.all_reduce(sums, group=self.mesh.dp_group)
        return sums

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] fp32 of tokens [B, T], the same on all ranks, which call together."""
        self.model.eval()
        logits = self.model(tokens).logits
        self.model.train()
        return logits

    def sum_over_data_parallel(self, value: Tensor) -> Tensor:
        """Sum a tensor over the data-parallel ranks, in place."""
        dist.all_reduce(value, group=self.mesh.dp_group)
        return value

    def _clip_gradients(self, max_norm: float) -> float:
        """Global norm of the model's gradients at ZeRO stage 0, after clipping by it as DeepSpeed does at other stages."""
        params = [param for param in self.model.parameters() if param.grad is not None]
        sharded = [p.grad for p in params if getattr(p, "tensor_model_parallel", False)]
        replicated = [p.grad for p in params if not getattr(p, "tensor_model_parallel", False)]
        square = self._square_sum(sharded)
        dist.all_reduce(square, group=self.mesh.tp_group)
        norm = float((square + self._square_sum(replicated)).sqrt())
        if self.control.maximum([not math.isfinite(norm)])[0]:
            raise NonFiniteError("the gradient norm is NaN or infinite, though the loss is finite")
        if max_norm > 0 and norm > max_norm:
            torch._foreach_mul_([*sharded, *replicated], max_norm / (norm + 1e-6))
        return norm

    def _square_sum(self, gradients: list[Tensor]) -> Tensor:
        sums = [gradient.float().square().sum() for gradient in gradients]
        return torch.stack(sums).sum() if sums else torch.zeros((), device=self.mesh.device)
