"""One engine: a model on Megatron-Core's groups, trained by DeepSpeed ZeRO with our optimizers, on gloo or NCCL alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hope_megatron.config.matrices.geometry import full_shape
from hope_megatron.config.run import RunConfig
from hope_megatron.engine.canonical import TreeSum
from hope_megatron.engine.clipping import clip_together
from hope_megatron.engine.deepspeed_setup import accumulate_together, ask_before_update, give_gradients, initialize
from hope_megatron.engine.overlap import OverlappedReduction, wants_overlap
from hope_megatron.engine.weight_gradient import add_in_products
from hope_megatron.layers.context_parallel import own_tokens
from hope_megatron.model import IGNORE
from hope_megatron.optim import BoundOptimizer, apply_lr
from hope_megatron.optim.adaptive import adapt_periods
from hope_megatron.optim.average import EMA
from hope_megatron.optim.zero import refresh_model_params
from hope_megatron.parallel.control import ControlGroup
from hope_megatron.parallel.distributed import Mesh, set_group_timeouts
from hope_megatron.parallel.question import UpdateQuestion
from hope_megatron.parallel.sequence_parallel import (
    SequenceParallelBucket,
    keeps_whole_gradients,
    reduce_sequence_parallel_gradients,
)
from hope_megatron.runtime.failures import CRASH
from hope_megatron.runtime.heartbeat import HEART
from hope_megatron.runtime.step_parts import implementation, uses


class NonFiniteError(Exception):
    """A loss or gradient is NaN or infinite. It is raised on all ranks together, before any parameter has changed."""

    is_user_error = True
    failure_kind = CRASH  # another machine may compute it rightly


class Engine:
    """Forward, backward and step of one run.

    Attributes:
        model: the language model (DeepSpeed casts it to the compute precision, ZeRO-3 partitions it).
        optimizer: our optimizer, which sees the flat fp32 vectors of ZeRO.
        zero: DeepSpeed's wrapper around it; the optimizer itself at ZeRO stage 0.
        mesh: this process's place.
        control: agreements between all ranks.
        accumulation_steps: forward-backward passes per step.
        skipped: whether the last step was refused, so that nothing changed.
    """

    def __init__(self, model: nn.Module, optimizer: BoundOptimizer, config: RunConfig, mesh: Mesh) -> None:
        self.config = config
        self.mesh = mesh
        self.control = ControlGroup()
        self.model = model
        self.optimizer = optimizer
        levels = enumerate(config.model.cms.levels, 1)
        self._adaptive = {i: rule for i, level in levels if (rule := level.update_period_adaptive) is not None}
        self.adapted: dict[str, float] = {}
        self.accumulation_steps = config.accumulation_steps(mesh.world_size)
        self._learns = config.model.cms.learns_in_context
        in_bucket = keeps_whole_gradients(config.training.precision, config.parallel.zero_stage) and mesh.tp_size > 1
        if not in_bucket:
            reduce_sequence_parallel_gradients(model, mesh.tp_group)
        self._deepspeed = initialize(model, optimizer, config, mesh)
        set_group_timeouts(config.resilience.hang.collective_timeout_s)
        self.zero = self._deepspeed.optimizer
        self._bucket = SequenceParallelBucket(model, self.zero, mesh.tp_group) if in_bucket else None
        self._update = UpdateQuestion(mesh.world_group, mesh.device)
        accumulate_together(self.zero)
        clip_together(self.zero)
        if uses("weight_gradient", "apex"):
            add_in_products(model, self.zero)
        ask_before_update(self.zero, config.parallel.zero_stage, self._update)
        keeps_sums = keeps_whole_gradients(config.training.precision, config.parallel.zero_stage) and mesh.dp_size > 1
        if keeps_sums and config.training.reduction != "canonical" and wants_overlap(config.parallel, mesh.device.type):
            dtype = torch.bfloat16 if config.parallel.reduce_dtype == "bf16" else torch.float32
            OverlappedReduction(model, self._deepspeed, mesh.dp_group, dtype)
        self.skipped = False
        self._tree = TreeSum() if config.training.reduction == "canonical" else None
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._canonical_loss: Tensor | None = None
        self.first_loss: Tensor | None = None
        """Sum of the losses of the last step's first micro-batch, on this rank; None where windows divide it."""
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
            tokens: [B, T] int64: the sequences, or under context parallelism this rank's slices of them (`own_spans`).
            targets: [B, T] int64; -100 does not count.
            global_valid_tokens: targets other than -100 in the global batch, over all ranks and accumulation steps.
            documents: see `LanguageModel.forward`.

        Returns:
            Sum of this micro-batch's losses, on the device, detached.
        """
        self._passes += 1
        window = (self.config.training.truncate_tokens or 0) // self.mesh.cp_size or tokens.size(1)
        windows = list(zip(tokens.split(window, 1), targets.split(window, 1), strict=True))
        if self._tree is not None:
            return self._backward_into_tree(windows, global_valid_tokens, documents)
        state, total = None, torch.zeros((), device=self.mesh.device)
        for i, (x, y) in enumerate(windows):
            last = i == len(windows) - 1
            self._deepspeed.set_gradient_accumulation_boundary(last and self._passes == self.accumulation_steps)
            HEART.enter("forward")
            output = self._deepspeed(x, y, state, documents=documents, return_state=not last, learn=self._learns)
            loss_sum = output.losses.sum()
            HEART.enter("backward")
            self._deepspeed.backward(loss_sum * (self.mesh.dp_size / global_valid_tokens), scale_wrt_gas=False)
            total += loss_sum.detach()
            if self._passes == 1 and len(windows) == 1:
                self.first_loss = total.clone()
            state = output.state.detach() if output.state is not None else None
        return total

    def step(
        self,
        lr_multiplier: float = 1.0,
        accept: Callable[[float], bool] | None = None,
        beside: Callable[[], Sequence[Tensor | float]] = tuple,
    ) -> float:
        """Clip and update with the accumulated gradients, unless they are refused.

        Args:
            lr_multiplier: what the schedule makes of every group's base learning rate.
            accept: asked with the global gradient norm on all ranks, which must answer alike. If it refuses, the gradients are
                dropped and nothing has changed; `skipped` says so. None: what is not finite is an error.
            beside: makes non-negative values that are read from the device with the norm, before `accept` is asked; `read_beside`
                then has the largest of each over all ranks.

        Returns:
            Global gradient norm before clipping, each parameter counted once.

        Raises:
            NonFiniteError: without `accept`, on all ranks, with parameters and optimizer state untouched.
        """
        if self._passes != self.accumulation_steps:
            raise RuntimeError(f"step() after {self._passes} of {self.accumulation_steps} forward_backward() calls")
        self._passes = 0
        HEART.enter("step")
        apply_lr(self.optimizer, lr_multiplier)
        self._update.norm, self._update.accept, self._update.read_beside = math.nan, accept or math.isfinite, beside
        if self.config.parallel.zero_stage == 0:
            self._step_unsharded()
        else:
            if self._bucket is not None:
                self._bucket.reduce()
            if self._tree is not None:
                self._take_tree()
                give_gradients(self.zero, self._gradient_square_sum()[0].sqrt())
            self._deepspeed.step()  # asks self._update
            self.skipped = bool(self.zero.overflow)
        self.adapted = adapt_periods(self.optimizer, self._adaptive) if self._adaptive and not self.skipped else {}
        norm = self._update.norm
        if self.skipped and accept is None:
            raise NonFiniteError("the gradient norm is NaN or infinite, though the loss is finite")
        return norm

    @property
    def read_beside(self) -> list[float]:
        """The values that the last step read beside its norm; NaN what was not finite on some rank."""
        return self._update.beside

    def _backward_into_tree(
        self, windows: list[tuple[Tensor, Tensor]], global_valid_tokens: Tensor | int, documents: Tensor | None
    ) -> Tensor:
        """The same as DeepSpeed's backward passes, with the micro-batch's loss and gradients as a leaf of the tree."""
        assert self._tree is not None
        state, total = None, torch.zeros((), device=self.mesh.device)
        gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        for i, (x, y) in enumerate(windows):
            last = i == len(windows) - 1
            HEART.enter("forward")
            output = self.model(x, y, state, documents=documents, return_state=not last, learn=self._learns)
            loss_sum = output.losses.sum()
            HEART.enter("backward")
            found = torch.autograd.grad(loss_sum / global_valid_tokens, self._parameters, allow_unused=True)
            for gradient, part in zip(gradients, found):
                if part is not None:
                    gradient += part
            total += loss_sum.detach()
            state = output.state.detach() if output.state is not None else None
        self._tree.add([total, *gradients])
        return total

    def global_loss(self, loss_sum: Tensor) -> Tensor:
        """Sum of the losses of the last step over all ranks, from that of this rank, on the device. Collective."""
        if self._canonical_loss is not None:
            return self._canonical_loss
        return self.sum_over_data_parallel(loss_sum)

    def _take_tree(self) -> None:
        """Gradients and loss of the whole global batch, in canonical order, as the parameters' gradients."""
        assert self._tree is not None
        self._canonical_loss, *gradients = self._tree.take(self.mesh.dp_group).split(
            [1, *(parameter.numel() for parameter in self._parameters)]
        )
        for parameter, gradient in zip(self._parameters, gradients):
            parameter.grad = gradient.view_as(parameter).clone()
        self._deepspeed.set_gradient_accumulation_boundary(True)

    def _step_unsharded(self) -> None:
        """At ZeRO stage 0 DeepSpeed neither clips as at other stages nor stops at NaN."""
        if self._tree is not None:
            self._take_tree()
        square, gradients = self._gradient_square_sum()
        self.skipped = not self._update.ask(square.sqrt())
        norm = self._update.norm
        if self.skipped:
            # DeepSpeed counts the step and drops the gradients; the optimizer is left out.
            self.optimizer.step = lambda *args, **kwargs: None  # type: ignore[method-assign]
        elif (limit := self.config.optim.grad_clip) > 0 and norm > limit:
            implementation("clipping").scale(gradients, limit / (norm + 1e-6))
        try:
            self._deepspeed.step()
        finally:
            self.optimizer.__dict__.pop("step", None)

    def replay(
        self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute a micro-batch beside training, which does not notice: sum of losses, and gradients of all parameters.

        No gradients on CUDA, where some are added up in any order, nor at ZeRO stage 3, where no rank has them whole.
        """
        output = self.model(tokens, targets, None, documents=documents, return_state=False, learn=self._learns)
        loss_sum = output.losses.sum()
        parameters = [p for p in self.model.parameters() if p.requires_grad and p.numel()]
        if self.mesh.device.type == "cuda" or self.config.parallel.zero_stage == 3:
            return loss_sum.detach(), ()
        gradients = torch.autograd.grad(loss_sum, parameters, allow_unused=True)
        return loss_sum.detach(), tuple(gradient for gradient in gradients if gradient is not None)

    def gradient_shards(self) -> list[Tensor]:
        """What this rank holds of the accumulated and reduced gradients, before a step."""
        if hasattr(self.zero, "fp32_groups_gradient_flat_partition"):  # bf16 at stage 1
            return list(self.zero.fp32_groups_gradient_flat_partition)
        shards = getattr(self.zero, "averaged_gradients", None)
        if shards is None:
            return [param.grad for param in self.model.parameters() if param.grad is not None]
        return [tensor for group in shards.values() if group is not None for tensor in group if tensor is not None]

    @torch.no_grad()
    def evaluate(
        self,
        tokens: Tensor,
        targets: Tensor,
        documents: Tensor | None = None,
        *,
        masks: Sequence[Tensor] = (),
        learn: bool = True,
    ) -> Tensor:
        """Sum of losses and number of valid tokens of a batch, over the data-parallel ranks. A model with inner clocks
        learns in context, as it does in training.

        Args:
            tokens: [B, T] int64, different on each data-parallel rank; all ranks call together. Under context parallelism this
                rank's slice of them (`own_spans`).
            targets: [B, T] int64; -100 does not count.
            documents: see `LanguageModel.forward`.
            masks: K times [B, T] bool: targets that are summed apart too.
            learn: False reads with static levels, in one piece.

        Returns:
            [1 + K, 2] float64 on the device: sum of losses and number of valid tokens, of all and of those of each mask.
        """
        self.model.eval()
        losses = self.model(tokens, targets, documents=documents, learn=learn and self._learns).losses
        self.model.train()
        losses, valid = losses.double(), targets != IGNORE
        parts = [(losses, valid), *((losses * mask, valid & mask) for mask in masks)]
        sums = torch.stack([torch.stack([part.sum(), count.sum().double()]) for part, count in parts])
        dist.all_reduce(sums, group=self.mesh.dp_group)
        return sums

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model with the exponential average of its weights (`training.ema`), for evaluations. Collective.

        Master weights and compute weights are what they were, bit by bit, when it ends.
        """
        vectors = [(b.tensor.detach().view(-1), self.optimizer.state[b.tensor]) for b in self.optimizer.bound_vectors()]
        kept = [flat.clone() for flat, _ in vectors]
        try:
            self._set_weights([(flat, state[EMA].view(-1)) for flat, state in vectors])
            yield
        finally:
            self._set_weights([(flat, value) for (flat, _), value in zip(vectors, kept)])

    @torch.no_grad()
    def _set_weights(self, values: list[tuple[Tensor, Tensor]]) -> None:
        for flat, value in values:
            flat.copy_(value)
        if self.config.parallel.zero_stage > 0:
            refresh_model_params(self.zero)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] fp32 of tokens [B, T], the same on all ranks, which call together."""
        self.model.eval()
        logits = self.model(own_tokens(tokens, 1)).logits
        self.model.train()
        return logits

    def sum_over_data_parallel(self, value: Tensor) -> Tensor:
        """Sum a tensor over the data-parallel ranks, in place."""
        dist.all_reduce(value, group=self.mesh.dp_group)
        return value

    def _gradient_square_sum(self) -> tuple[Tensor, list[Tensor]]:
        """Square of the global norm of the model's gradients at ZeRO stage 0, and the gradients."""
        params = [param for param in self.model.parameters() if param.grad is not None]
        sharded = [p.grad for p in params if getattr(p, "tensor_model_parallel", False)]
        replicated = [p.grad for p in params if not getattr(p, "tensor_model_parallel", False)]
        square = self._square_sum(sharded)
        dist.all_reduce(square, group=self.mesh.tp_group)
        return square + self._square_sum(replicated), [*sharded, *replicated]

    def _square_sum(self, gradients: list[Tensor]) -> Tensor:
        if not gradients:
            return torch.zeros((), device=self.mesh.device)
        return implementation("clipping").norm(gradients).square()
