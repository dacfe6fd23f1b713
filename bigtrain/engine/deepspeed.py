"""DeepSpeed ZeRO: the main engine, and the only place that writes a ds_config."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain import heap
from bigtrain.batch import Batch, LossSums
from bigtrain.config import Config, DeepSpeedConfig, MuonConfig, accumulation_steps, micro_batch
from bigtrain.engine import disk_states, lean, optimizers, persistent, shards, unpickling
from bigtrain.engine.base import LossFunction, StepOutcome, T, Write
from bigtrain.engine.snapshot import snapshot
from bigtrain.redact import redact

STATE = "engine"  # the checkpoint's subdirectory ("tag") for DeepSpeed's own files


def ds_config(config: Config, world_size: int, device: str) -> dict[str, Any]:
    """The whole ds_config of a run, with every option that bears on it explicit: DeepSpeed's defaults have moved.

    `device` is cpu or cuda. What the user passes through in `engine.deepspeed` (checked before) wins over ours.
    """
    engine, train = config.engine, config.train
    assert isinstance(engine, DeepSpeedConfig)
    element_bytes = 4 if train.precision == "fp32" else 2
    bucket_elements = engine.bucket_mib * 2**20 // element_bytes
    on_gpu = device == "cuda"
    accumulation = accumulation_steps(config, world_size)
    # bf16 has too few bits to add up many micro-batches in. Stage 0 cannot, stage 1 would take another optimizer.
    fp32_accumulation = train.precision == "bf16" and engine.stage >= 2 and accumulation > 1
    zero: dict[str, Any] = {
        "stage": engine.stage,
        "contiguous_gradients": True,
        "reduce_scatter": not (engine.stage == 3 and isinstance(config.optimizer, MuonConfig)),  # DeepSpeed refuses
        "reduce_bucket_size": bucket_elements,
        "use_multi_rank_bucket_allreduce": True,
        "allgather_partitions": True,
        "allgather_bucket_size": bucket_elements,
        "overlap_comm": engine.overlap_comm and on_gpu,  # it overlaps CUDA streams; a CPU has none
        "round_robin_gradients": False,
        "elastic_checkpoint": False,
        "load_from_fp32_weights": True,
        "ignore_unused_parameters": True,
    }
    if engine.offload_optimizer != "none":
        zero["offload_optimizer"] = {
            "device": engine.offload_optimizer,
            "nvme_path": engine.nvme_path,
            "pin_memory": on_gpu,
            "buffer_count": 4,
            "pipeline_read": False,
            "pipeline_write": False,
            "fast_init": False,
            "ratio": 1.0,
        }
    if engine.stage == 3:
        zero |= {
            "sub_group_size": 1_000_000_000,
            "stage3_prefetch_bucket_size": bucket_elements,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,  # we stream them ourselves
            "zero_quantized_weights": engine.quantized_communication,
            "zero_quantized_gradients": engine.quantized_communication,
            "zero_quantized_nontrainable_weights": False,
        }
        if engine.offload_parameters != "none":
            zero["offload_param"] = {
                "device": engine.offload_parameters,
                "nvme_path": engine.nvme_path,
                "pin_memory": on_gpu,
                "buffer_count": 5,
                "buffer_size": 100_000_000,
                "max_in_cpu": 1_000_000_000,
            }
    whole: dict[str, Any] = {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch(config, world_size),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.grad_clip,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": train.precision,
        "bf16": {"enabled": train.precision == "bf16", "check_grad_overflow": True, "immediate_grad_update": False},
        "fp16": {
            "enabled": train.precision == "fp16",
            "auto_cast": False,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "consecutive_hysteresis": False,
            "min_loss_scale": 1,
        },
        "data_types": {"grad_accum_dtype": "fp32" if fp32_accumulation else train.precision},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }
    return _merged(whole, engine.deepspeed)


def _merged(ours: dict[str, Any], users: dict[str, Any]) -> dict[str, Any]:
    result = dict(ours)
    for key, value in users.items():
        both_sections = isinstance(value, dict) and isinstance(ours.get(key), dict)
        result[key] = _merged(ours[key], value) if both_sections else value
    return result


NORM_PIECE = 2**20  # elements


def _norm_in_pieces(optimizer: Any) -> None:
    """DeepSpeed's gradient norm makes a float64 copy of each gradient, 300 MB for a word embedding of GPT-2: on a CPU a
    tenth of a step. The norm of the norms of pieces is the same number."""
    if not hasattr(optimizer, "get_grad_norm_direct"):  # stage 0
        return
    whole = optimizer.get_grad_norm_direct

    def norm(gradients: Iterable[Tensor], parameters: Iterable[nn.Parameter], *arguments: Any) -> Tensor:
        counted = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
        pieces = [
            (piece, parameter)
            for gradient, parameter in zip(counted, parameters, strict=False)  # as far as DeepSpeed goes
            for piece in gradient.flatten().split(NORM_PIECE)
        ]
        return whole([piece for piece, _ in pieces], [parameter for _, parameter in pieces], *arguments)

    optimizer.get_grad_norm_direct = norm


class DeepSpeedEngine:
    """ZeRO stages 0 to 3 (arXiv 1910.02054), offload (2101.06840) and Infinity (2104.07857)."""

    def __init__(self, config: Config, build_model: Callable[[], nn.Module], device: torch.device) -> None:
        lean.import_deepspeed()
        import deepspeed

        # An op for all-reduce in inference: training never calls it, yet initialisation would build it (a minute of
        # compiling at first use) and leak its 66 MiB of shared memory per rank.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

        assert isinstance(config.engine, DeepSpeedConfig)
        self.device = device
        deepspeed.init_distributed(dist_init_required=False, verbose=False)  # adopt the process group that there is
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.stage = config.engine.stage
        self.precision = config.train.precision
        settings = ds_config(config, self.world_size, device.type)

        born_sharded = self.stage == 3 and config.engine.zero_init
        if born_sharded:  # transformers and torchao bring torch._dynamo, which cannot be imported while zero.Init lasts
            importlib.import_module("torch._dynamo")
        with contextlib.ExitStack() as birth:
            if born_sharded:
                birth.enter_context(heap.trimmed_while_born())
                birth.enter_context(deepspeed.zero.Init(config_dict_or_path=settings))
            model = build_model()
        offloaded = config.engine.offload_optimizer != "none"
        groups = optimizers.parameter_groups(model, config.optimizer, config.train.layer_lr_decay)
        optimizer = optimizers.build(config.optimizer, groups, device, offloaded)
        optimizers.remember_peak_lr(optimizer)
        if not isinstance(config.optimizer, MuonConfig):
            optimizers.set_lr(optimizer, 0.0)  # stage 0 makes an empty step at initialisation
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        _norm_in_pieces(self.engine.optimizer)
        if self.stage == 3:
            persistent.gather_together(self.engine.optimizer)
        self.model = self.engine.module
        self.optimizer = optimizer
        if self.stage == 0:
            optimizer.state.clear()  # ... which must not count as the first for Adam's bias correction
        unpickling.allow_deepspeed()
        heap.trim()  # of what the parameters were before DeepSpeed moved them into flat buffers

    def forward_backward(self, loss_function: LossFunction, batch: Batch, scale: float, last: bool) -> LossSums:
        self.engine.set_gradient_accumulation_boundary(last)
        sums = loss_function(self.engine, batch)
        # DeepSpeed averages over the ranks, and (unless scale_wrt_gas is off) over the micro-batches: undo it.
        self.engine.backward(sums.loss * (scale * self.world_size), scale_wrt_gas=False)
        return LossSums(sums.loss.detach(), sums.nll)

    @torch.no_grad()
    def evaluate(self, function: Callable[[nn.Module, Batch], T], batch: Batch) -> T:
        return function(self.engine, batch)

    def step(self, lr_multiplier: float) -> StepOutcome:
        optimizers.set_lr(self.optimizer, lr_multiplier)
        if self.stage == 0 and self.precision == "fp32":  # here alone DeepSpeed neither looks at the norm nor tells it
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if not math.isfinite(norm):
                self.discard()
                return StepOutcome(norm, False)
            self.engine.step()
            return StepOutcome(norm, True)
        self.engine.step()
        return StepOutcome(self.engine.get_global_grad_norm(), self.engine.was_step_applied())

    def discard(self) -> None:
        """DeepSpeed's own way out of an overflow, but for the loss scale, which stays as it is."""
        optimizer = self.engine.optimizer
        if self.stage == 0:
            self.engine.zero_grad()
            optimizer.zero_grad()
            return

        def overflow(*_: Any, **__: Any) -> bool:
            optimizer.overflow = True
            return True

        forced: dict[str, Any] = {
            "check_grad_overflow": True,  # stages 1 and 2 look only then
            "has_overflow": overflow,
            "_overflow_check_and_loss_scale_update": overflow,  # stage 3
            "_update_scale": lambda has_overflow=False: None,
        }
        before = {name: vars(optimizer)[name] for name in forced if name in vars(optimizer)}
        vars(optimizer).update(forced)
        try:
            self.engine.step()
        finally:
            for name in forced:
                del vars(optimizer)[name]
            vars(optimizer).update(before)

    @property
    def loss_scale(self) -> float:
        return float(getattr(self.engine.optimizer, "loss_scale", 1.0))

    def save(self, directory: Path, later: bool) -> list[Write]:
        """DeepSpeed saves between barriers: a rank that failed must still reach them, and raise only afterwards."""
        writer, problems = self.engine.checkpoint_engine, []
        write = writer.save
        writes: list[Write] = []

        def guarded(state_dict: Any, path: str) -> None:
            try:
                if "ds_config" in state_dict:  # which can hold a key (comet.api_key); loading does not need it
                    state_dict = state_dict | {"ds_config": redact(state_dict["ds_config"])}
                copied = snapshot(state_dict) if later else None
                if copied is None:
                    write(state_dict, path)
                    return

                def write_copy() -> list[Path]:
                    write(copied, path)
                    return [Path(path)]

                writes.append(write_copy)
            except Exception as error:
                problems.append(error)

        self.engine._copy_recovery_script = lambda path: None  # consolidated weights lie beside it already
        writer.save = guarded
        try:
            with self._all_but_disk_states():
                self.engine.save_checkpoint(str(directory), tag=STATE, save_latest=False)
        finally:
            writer.save = write
        if problems:
            raise problems[0]
        if self._states_on_disk:
            disk_states.save(self.engine.optimizer, directory / STATE, self.rank)
        shards.write_layout(self, directory / STATE)
        return writes

    def load(self, directory: Path) -> None:
        with optimizers.hyperparameters_kept(self.optimizer), self._all_but_disk_states():
            self.engine.load_checkpoint(str(directory), tag=STATE)
        if self._states_on_disk:
            disk_states.load(self.engine.optimizer, directory / STATE, self.rank)

    @property
    def _states_on_disk(self) -> bool:
        return shards.form(self) == shards.NVME

    def _all_but_disk_states(self) -> contextlib.AbstractContextManager[None]:
        return disk_states.left_out(self.engine) if self._states_on_disk else contextlib.nullcontext()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        import deepspeed

        for name, parameter in self.model.named_parameters():
            gathered = deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3)
            with gathered:
                whole = parameter.detach()
                yield name, whole.cpu().clone() if self.rank == 0 else torch.empty(0)

    def effective_config(self) -> dict[str, object]:
        """What DeepSpeed made of it: the dictionary it was given, and its parsed sections with their defaults."""
        parsed = self.engine._config
        sections = {
            "zero_optimization": parsed.zero_config,
            "bf16": parsed.bfloat16_config,
            "fp16": parsed.float16_config,
        }
        scalars = {
            key: value
            for key, value in vars(parsed).items()
            if isinstance(value, (bool, int, float, str, type(None))) and not key.startswith("_")
        }
        return {
            "given": self.engine.config,
            "seen": scalars | {name: section.model_dump(mode="json") for name, section in sections.items()},
        }
