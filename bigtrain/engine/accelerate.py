"""Hugging Face Accelerate: the reference engine, for one process, DDP and FSDP2.

bf16 is autocast over fp32 parameters here, so the parameters are their own master weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from bigtrain.batch import Batch, LossSums
from bigtrain.config import AccelerateConfig, Config
from bigtrain.engine import optimizers, shards, unpickling
from bigtrain.engine.base import LossFunction, StepOutcome, T, Write

STATE = "engine"


class AccelerateEngine:
    loss_scale = 1.0

    def __init__(self, config: Config, build_model: Callable[[], nn.Module], device: torch.device) -> None:
        from accelerate import Accelerator, PartialState
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        assert isinstance(config.engine, AccelerateConfig)
        unpickling.restrict_index()
        self.device = device
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.grad_clip = config.train.grad_clip
        self.precision = config.train.precision
        self.sharded = config.engine.parallel == "fsdp2" and self.world_size > 1
        plugin = None
        if self.sharded:
            if device.type == "cpu":
                # torch shards on CPUs, Accelerate refuses to ask it to: present the ranks as a kind that it shards.
                PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                reshard_after_forward=True,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["Block"],
                state_dict_type="SHARDED_STATE_DICT",
            )
        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no" if config.train.precision == "fp32" else config.train.precision,
            fsdp_plugin=plugin,
        )
        model = build_model().to(device)
        if plugin is not None and (names := getattr(model, "layer_names", None)):
            plugin.transformer_cls_names_to_wrap = names
        groups = optimizers.parameter_groups(model, config.optimizer, config.train.layer_lr_decay)
        optimizer = optimizers.build(config.optimizer, groups, device, offloaded=False)
        optimizers.remember_peak_lr(optimizer)
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.model = self.accelerator.unwrap_model(self.wrapped)

    def forward_backward(self, loss_function: LossFunction, batch: Batch, scale: float, last: bool) -> LossSums:
        if self.sharded:
            self.wrapped.set_requires_gradient_sync(last)
        elif self.world_size > 1:
            self.wrapped.require_backward_grad_sync = last
        sums = loss_function(self.wrapped, batch)
        self.accelerator.backward(sums.loss * (scale * self.world_size))  # DDP and FSDP2 average over the ranks
        return LossSums(sums.loss.detach(), sums.nll)

    @torch.no_grad()
    def evaluate(self, function: Callable[[nn.Module, Batch], T], batch: Batch) -> T:
        return function(self.wrapped, batch)

    def step(self, lr_multiplier: float) -> StepOutcome:
        optimizers.set_lr(self.optimizer, lr_multiplier)
        norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.grad_clip or float("inf"))
        if self.sharded:
            norm = norm.full_tensor()
        applied = math.isfinite(norm)
        if applied:
            self.optimizer.step()
        self.discard()
        return StepOutcome(norm, applied)

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, directory: Path, later: bool) -> list[Write]:
        """Accelerate writes at once, whatever `later` says."""
        self.accelerator.save_state(str(directory / STATE), safe_serialization=True)
        shards.write_layout(self, directory / STATE)
        return []

    def load(self, directory: Path) -> None:
        with optimizers.hyperparameters_kept(self.optimizer):
            self.accelerator.load_state(str(directory / STATE))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            whole = parameter.detach()
            if self.sharded:
                whole = whole.full_tensor()  # type: ignore[operator]
            yield name, whole.cpu().clone() if self.rank == 0 else torch.empty(0)

    def effective_config(self) -> dict[str, object]:
        state = self.accelerator.state
        return {
            "distributed_type": str(state.distributed_type.value),
            "mixed_precision": state.mixed_precision,
            "num_processes": state.num_processes,
            "device": str(state.device),
        }
