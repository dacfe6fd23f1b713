"""What a user may pass through to DeepSpeed in `engine.deepspeed`: every key, its type, and whose it is.

DeepSpeed itself says nothing about a mistyped key outside its pydantic sections, drops the text "auto", and takes
"yes" or -1 where they mean something else than they say. Three questions are asked here, before any process starts
and without importing DeepSpeed; each raises ConfigError:

validate     does DeepSpeed know this key, and will it read this value as it is meant?
owned        is it ours to set, from a field of our own, or out of place in a bigtrain run?
check_stage  does anything read it at this ZeRO stage?

The options are in deepspeed_options.json, as DeepSpeed 0.19.8 has them: key -> type, or a section. A type is one or
more of these, with " or " between them: bool, int, whole (an int, for which 5e8 will do), number, text, texts (a list
of text), list, dict (keys that DeepSpeed does not fix), null, or a literal word. Bounds follow a number: "int>0",
"number>=0<=1". A section whose name ends in "?" may be null. tests/engine/test_deepspeed_schema.py holds the file
and the tables below to the installed DeepSpeed: run it after an upgrade, it names what to change.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from bigtrain.errors import NO_VALUE, ConfigError, unknown_key

PATH = "engine.deepspeed"

# Gone from DeepSpeed 0.19: what to use instead.
REMOVED = {
    "amp": "use train.precision",
    "compression_training": "leave it out",
    "curriculum_learning": "leave it out",
    "eigenvalue": "leave it out",
    "elasticity": "leave it out",
    "graph_harvesting": "use train.compile",
    "nebula": "leave it out: bigtrain writes checkpoints itself",
    "progressive_layer_drop": "leave it out",
    "quantize_training": "leave it out",
    "sparse_attention": "leave it out",
    "sparse_gradients": "leave it out",
    "zero_optimization.mics_shard_size": "use {path}.zero_optimization.zero_hpz_partition_size",
    "zero_optimization.mics_hierarchical_params_gather": "leave it out",
    "zero_optimization.zeropp_loco_param": "leave it out",
}

# Second names. One name for one thing: of two spellings in one config DeepSpeed reads one and is silent on the other.
RENAMED = {
    "bfloat16": "{path}.bf16",
    "zero_optimization.cpu_offload": "engine.offload_optimizer",
    "zero_optimization.cpu_offload_param": "engine.offload_parameters",
    "zero_optimization.cpu_offload_use_pin_memory": "{path}.zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "{path}.zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ),
    "tensor_parallel.tensor_parallel": "{path}.tensor_parallel.tp",
    "tensor_parallel.replace_with_kernel_inject": "{path}.tensor_parallel.kernel_inject",
} | {
    f"zero_optimization.{name}": f"{{path}}.zero_optimization.stage3_{name}"
    for name in (
        "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters",
        "max_reuse_distance", "gather_16bit_weights_on_model_save", "module_granularity_threshold",
        "use_all_reduce_for_fetch_params", "allgather_sequential",
    )
}  # fmt: skip

# Read by DeepSpeed 0.19 and then used nowhere (legacy_stage1: refused on every rank). Only this value is true.
WITHOUT_EFFECT = {
    "disable_allgather": False,
    "zero_optimization.allgather_partitions": True,
    "zero_optimization.legacy_stage1": False,
}

# Set by bigtrain from a field of its own.
SET_BY = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "train.grad_clip",
    "steps_per_print": "logger.log_every",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "torch_autocast": "train.precision",
    "data_types.param_dtype": "train.precision",
    "zero_optimization.stage": "engine.stage",
    "zero_optimization.overlap_comm": "engine.overlap_comm",
    "zero_optimization.offload_optimizer.device": "engine.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "engine.nvme_path",
    "zero_optimization.offload_param.device": "engine.offload_parameters",
    "zero_optimization.offload_param.nvme_path": "engine.nvme_path",
    "activation_checkpointing": "train.activation_checkpointing",
    "compile": "train.compile",
    "wandb": "logger.wandb",
    "checkpoint.load_universal": "resume",
}

# DeepSpeed knows it, but in a bigtrain run it would do nothing, or harm.
_MASTER_WEIGHTS = "bigtrain keeps master weights and optimizer states in fp32"
_CHECKPOINTS = "bigtrain writes checkpoints itself, whole and checksummed"
_PARALLEL = "bigtrain's ranks are data-parallel only"
_LOADER = "bigtrain loads the data itself"
OUT_OF_PLACE = {
    "zero_allow_untested_optimizer": "set by bigtrain, which tests the optimizers it offers",
    "zero_force_ds_cpu_optimizer": "set by bigtrain to fit the optimizer",
    "managed_gradient_accumulation": "bigtrain's loop says where a step ends",
    "gradient_allreduce_op": "bigtrain divides gradients by the global number of target tokens",
    "bf16.bf16_master_weights_and_grads": _MASTER_WEIGHTS,
    "bf16.bf16_optimizer_states": _MASTER_WEIGHTS,
    "fp16.fp16_master_weights_and_grads": _MASTER_WEIGHTS,
    "checkpoint.use_node_local_storage": _CHECKPOINTS,
    "checkpoint.writer": _CHECKPOINTS,
    "checkpoint.parallel_write": "read by DeepSpeed's pipeline engine only",
    "datastates_ckpt": _CHECKPOINTS,
    "pipeline": "read by DeepSpeed's pipeline engine only",
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "data_parallel_size": _PARALLEL,
    "seq_parallel_communication_data_type": _PARALLEL,
    "use_data_before_expert_parallelism": _PARALLEL,
    "data_efficiency": _LOADER,
    "dataloader_drop_last": _LOADER,
    "hybrid_engine": "for reinforcement learning with generation in the loop, which bigtrain does not do",
    "weight_quantization": "for inference, not for training",
    "autotuning": "bigtrain does not start DeepSpeed's autotuner",
}

# Where the engine's ZeRO optimizer of a stage takes the option at all (DeepSpeedEngine._configure_zero_optimizer).
# What is not named here: zero_optimization.stage3_* needs 3, other keys of zero_optimization need 1, 2 or 3.
_ZERO_1_2 = (
    "allgather_bucket_size", "use_multi_rank_bucket_allreduce", "ignore_unused_parameters", "round_robin_gradients",
    "parameter_alignment", "compute_grad_norm", "elastic_checkpoint",
)  # fmt: skip
_ZERO_3 = (
    "sub_group_size", "offload_param", "leaf_module", "zero_hpz_partition_size", "zero_quantized_weights",
    "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "memory_efficient_linear",
    "pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks",
    "save_muon_momentum_buffer_in_memory", "offload_optimizer.buffer_count", "offload_optimizer.pipeline_read",
    "offload_optimizer.pipeline_write", "offload_optimizer.fast_init", "offload_optimizer.ratio",
    "offload_optimizer.super_offload", "offload_optimizer.cpuadam_cores_perc",
)  # fmt: skip
STAGES: dict[str, tuple[int, ...]] = {
    "aio": (3,),  # NVMe offload is stage 3's
    "bf16.immediate_grad_update": (1,),  # BF16_Optimizer's
    "data_types.grad_accum_dtype": (1, 2, 3),  # stage 0 accumulates in the model's type only
}
STAGES |= {f"zero_optimization.{name}": (1, 2) for name in _ZERO_1_2}
STAGES |= {f"zero_optimization.{name}": (3,) for name in _ZERO_3}


@cache
def options() -> dict[str, Any]:
    """The table of deepspeed_options.json: name -> type (text) or section (the same again)."""
    table: dict[str, Any] = json.loads(Path(__file__).with_name("deepspeed_options.json").read_text(encoding="utf-8"))
    return table


def validate(section: dict[str, Any], path: str = PATH) -> None:
    """Raise ConfigError for the first key or value that DeepSpeed would ignore or read as something else."""
    _validate(section, options(), path, "")


def owned(section: dict[str, Any], path: str = PATH) -> None:
    """Raise ConfigError for a key that bigtrain sets (naming our field) or that has no place in its runs."""
    for key, _ in _walk(section):
        if key in SET_BY:
            raise ConfigError(f"{path}.{key}", NO_VALUE, f"set by {SET_BY[key]}", f"use {SET_BY[key]}")
        if key in OUT_OF_PLACE:
            raise ConfigError(f"{path}.{key}", NO_VALUE, OUT_OF_PLACE[key], "leave it out")


def check_stage(section: dict[str, Any], stage: int, path: str = PATH) -> None:
    """Raise ConfigError for an option that nothing reads, or that fails on every rank, at this ZeRO stage (0 to 3)."""
    for key, value in _walk(section):
        stages = _stages(key)
        if stage not in stages:
            needed = " or ".join(map(str, stages))
            raise _error(f"{path}.{key}", value, f"needs ZeRO stage {needed}, not engine.stage={stage}", "leave it out")
    if stage >= 2 and section.get("zero_optimization", {}).get("reduce_scatter", True):
        way_out = f"leave it out, or set {path}.zero_optimization.reduce_scatter=false"
        problem = f"not possible with reduce-scatter at ZeRO stage {stage}"
        if section.get("prescale_gradients"):
            raise ConfigError(f"{path}.prescale_gradients", True, problem, way_out)
        if stage == 2 and (factor := section.get("gradient_predivide_factor", 1)) != 1:
            raise ConfigError(f"{path}.gradient_predivide_factor", factor, problem, way_out)


def _validate(section: Any, table: dict[str, Any], path: str, prefix: str) -> None:
    """Check `section` against `table`. `path` names it to the user, `prefix` in the tables of this file."""
    if not isinstance(section, dict):
        raise ConfigError(path, section, "a section is wanted here, with keys of its own")
    root = path.removesuffix("." + prefix.rstrip(".")) if prefix else path
    names = {name.rstrip("?"): name for name in table}
    for key, value in section.items():
        name, field = f"{prefix}{key}", f"{path}.{key}"
        if name in REMOVED:
            raise ConfigError(field, NO_VALUE, "removed from DeepSpeed", REMOVED[name].format(path=root))
        if name in RENAMED:
            raise ConfigError(field, NO_VALUE, "another name", f"use {RENAMED[name].format(path=root)}")
        if key not in names:
            raise unknown_key(field, names)
        wanted = table[names[key]]
        if value == "auto" and (isinstance(wanted, dict) or "auto" not in wanted.split(" or ")):
            raise ConfigError(
                field, value, "only Hugging Face Trainer fills this in", "give the value or leave the key out"
            )
        if isinstance(wanted, dict):
            if value is not None or not names[key].endswith("?"):
                _validate(value, wanted, field, f"{name}.")
        elif not any(_fits(value, kind) for kind in wanted.split(" or ")):
            words = " or ".join(map(_words, wanted.split(" or ")))
            raise _error(field, value, f"wrong type or value, {words} is wanted")
        elif name in WITHOUT_EFFECT and value != WITHOUT_EFFECT[name]:
            raise ConfigError(field, value, "has no effect in DeepSpeed any more", "leave it out")


_WORDS = {
    "bool": "true or false", "int": "a whole number", "whole": "a whole number", "number": "a number", "text": "text",
    "texts": "a list of text", "list": "a list", "dict": "a section",
}  # fmt: skip
_BOUNDS = {
    ">=": (operator.ge, "of at least"), "<=": (operator.le, "of at most"),
    ">": (operator.gt, "above"), "<": (operator.lt, "below"),
}  # fmt: skip


def _bounds(kind: str) -> tuple[str, list[tuple[str, float]]]:
    """Split "number>=0<=1" into "number" and [(">=", 0.0), ("<=", 1.0)]."""
    limits = re.findall(r"([<>]=?)(-?[\d.]+)", kind)
    return re.split("[<>]", kind)[0], [(sign, float(limit)) for sign, limit in limits]


def _fits(value: Any, kind: str) -> bool:
    """Is `value` of this kind? A bool is no number: `1` and `true` say different things in a config."""
    name, limits = _bounds(kind)
    if name in ("int", "whole", "number"):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        whole = isinstance(value, int) or (name == "whole" and value.is_integer())
        return (whole or name == "number") and all(_BOUNDS[sign][0](value, limit) for sign, limit in limits)
    if name == "null":
        return value is None
    if name == "texts":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    types = {"bool": bool, "text": str, "list": list, "dict": dict}
    return isinstance(value, types[name]) if name in types else isinstance(value, str) and value == name


def _words(kind: str) -> str:
    name, limits = _bounds(kind)
    between = " and ".join(f"{_BOUNDS[sign][1]} {limit:g}" for sign, limit in limits)
    return f"{_WORDS.get(name, name)} {between}".strip()


def _walk(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key at every depth, dotted, a section before its keys."""
    for key, value in section.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")


def _stages(key: str) -> tuple[int, ...]:
    if key in STAGES:
        return STAGES[key]
    if key.startswith("zero_optimization.stage3_"):
        return (3,)
    return (1, 2, 3) if key.startswith("zero_optimization.") else (0, 1, 2, 3)


def _error(field: str, value: Any, problem: str, way_out: str = "") -> ConfigError:
    return ConfigError(field, NO_VALUE if isinstance(value, dict) else value, problem, way_out)
