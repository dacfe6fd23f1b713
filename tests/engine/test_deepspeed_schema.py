"""The passthrough `engine.deepspeed`: what passes, what fails and in which words, and is the table DeepSpeed's own."""

from __future__ import annotations

import ast
import enum
import inspect
import subprocess
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any

import pytest

from bigtrain.engine import deepspeed_schema as schema
from bigtrain.errors import ConfigError

# ------------------------------------------------------------------------------------------- tables of examples

# The shapes of public ds_configs: which part of each is fine-tuning, and at which stage it means something.
VALID: dict[str, tuple[int, dict[str, Any]]] = {
    "empty": (0, {}),
    "transformers, ZeRO-3 with CPU offload": (
        3,
        {
            "fp16": {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
            "zero_optimization": {
                "offload_optimizer": {"pin_memory": True},
                "offload_param": {"pin_memory": True},
                "contiguous_gradients": True,
                "sub_group_size": 1e14,
                "reduce_bucket_size": 5e8,
                "stage3_prefetch_bucket_size": 0,
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": 1e9,
                "stage3_max_reuse_distance": 1e9,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "wall_clock_breakdown": False,
        },
    ),
    "LLaMA-Factory, ZeRO-2": (
        2,
        {
            "zero_optimization": {
                "allgather_partitions": True,
                "allgather_bucket_size": 5e8,
                "reduce_scatter": True,
                "reduce_bucket_size": 5e8,
                "contiguous_gradients": True,
                "round_robin_gradients": True,
            }
        },
    ),
    "DeepSpeedExamples, ZeRO-Infinity": (
        3,
        {
            "zero_optimization": {
                "sub_group_size": 100_000_000,
                "offload_optimizer": {"buffer_count": 4, "pipeline_read": False, "pipeline_write": False},
                "offload_param": {"max_in_cpu": 1, "pin_memory": True},
            },
            "fp16": {"loss_scale": 1024, "min_loss_scale": 1},
            "aio": {"block_size": 1048576, "queue_depth": 16, "single_submit": False, "overlap_events": True},
        },
    ),
    "ZeRO++": (3, {"zero_optimization": {"zero_hpz_partition_size": 8, "zero_quantized_weights": True}}),
    "ZenFlow": (2, {"zero_optimization": {"zenflow": {"topk_ratio": 0.1, "update_interval": "auto"}}}),
    "a section switched off": (2, {"zero_optimization": {"offload_optimizer": None}}),
    "profiling": (
        1,
        {
            "communication_data_type": "bf16",
            "flops_profiler": {"enabled": True, "profile_step": 1, "module_depth": -1, "output_file": None},
            "comms_logger": {"enabled": True, "prof_all": False, "prof_ops": ["all_reduce"]},
            "tensorboard": {"enabled": True, "output_path": "logs/", "job_name": "a_run"},
            "checkpoint": {"tag_validation": "Warn"},
            "timers": {"throughput": {"synchronized": False}},
        },
    ),
}

# What fails in `validate`: the keys down to the value, the value, words of the message.
INVALID: list[tuple[str, Any, tuple[str, ...]]] = [
    # unknown keys, with the nearest name
    ("gradient_clippping", 1.0, ("unknown key", "did you mean engine.deepspeed.gradient_clipping?")),
    ("zero_optimisation", {}, ("did you mean engine.deepspeed.zero_optimization?",)),
    ("zero_optimization.overlap_com", True, ("did you mean engine.deepspeed.zero_optimization.overlap_comm?",)),
    (
        "zero_optimization.stage3_param_persitance_threshold",  # DeepSpeedExamples' own, for two years
        1e5,
        ("did you mean engine.deepspeed.zero_optimization.stage3_param_persistence_threshold?",),
    ),
    ("zero_optimization.offload_param.max_in_cpus", 1, ("did you mean", "offload_param.max_in_cpu?")),
    ("flops_profiler.profile_stp", 3, ("did you mean engine.deepspeed.flops_profiler.profile_step?",)),
    ("zero_optimization.offload_param?", {}, ("unknown key",)),
    ("aio.thread_count", 2, ("unknown key", "valid keys in engine.deepspeed.aio", "intra_op_parallelism")),
    ("checkpoint.tag_validaton", "Warn", ("did you mean engine.deepspeed.checkpoint.tag_validation?",)),
    ("activation_checkpointing.partitioned_activations", True, ("did you mean", "partition_activations?")),
    ("monitor_config", {"enabled": True}, ("unknown key", "tensorboard")),
    ("comms_config", {"verbose": False}, ("unknown key",)),
    ("timers.throughput.synchronised", True, ("did you mean", "throughput.synchronized?")),
    ("bf16.check_overflow", True, ("did you mean engine.deepspeed.bf16.check_grad_overflow?",)),
    # wrong types and values
    ("bf16.enabled", "yes", ("engine.deepspeed.bf16.enabled='yes'", "true or false is wanted")),
    ("bf16.enabled", 1, ("true or false is wanted",)),
    ("gradient_clipping", -1, ("gradient_clipping=-1", "a number of at least 0 is wanted")),
    ("gradient_clipping", "1", ("gradient_clipping='1'", "a number of at least 0 is wanted")),
    ("gradient_clipping", True, ("a number of at least 0 is wanted",)),
    ("gradient_clipping", float("nan"), ("a number of at least 0 is wanted",)),
    ("communication_data_type", "half", ("fp16 or bf16 or fp32 or null is wanted",)),
    ("zero_optimization", True, ("a section is wanted here",)),
    ("zero_optimization.stage", 4, ("a whole number of at least 0 and of at most 3",)),
    ("zero_optimization.reduce_bucket_size", 5.5, ("a whole number above 0 is wanted",)),
    ("zero_optimization.reduce_bucket_size", "5e8", ("a whole number above 0 is wanted",)),
    ("zero_optimization.offload_optimizer", "cpu", ("a section is wanted here",)),
    ("zero_optimization.offload_optimizer.device", "gpu", ("none or cpu or nvme is wanted",)),
    ("zero_optimization.offload_optimizer.ratio", 1.5, ("a number of at least 0 and of at most 1",)),
    ("aio.block_size", 1e6, ("a whole number above 0 is wanted",)),  # handed to C++ as it is
    ("comms_logger.prof_ops", "all_reduce", ("a list of text is wanted",)),
    ("wall_clock_breakdown", "false", ("true or false is wanted",)),
    ("fp16", None, ("a section is wanted here",)),
    # what only another program would fill in
    ("train_batch_size", "auto", ("only Hugging Face Trainer fills this in",)),
    ("zero_optimization.reduce_bucket_size", "auto", ("only Hugging Face Trainer fills this in",)),
    ("zero_optimization.offload_param", "auto", ("only Hugging Face Trainer fills this in",)),
    # removed, renamed, without effect
    ("compression_training", {"weight_quantization": {}}, ("removed from DeepSpeed", "leave it out")),
    ("amp", {"enabled": True}, ("removed from DeepSpeed", "use train.precision")),
    (
        "zero_optimization.mics_shard_size",
        8,
        ("removed from DeepSpeed", "use engine.deepspeed.zero_optimization.zero_hpz_partition_size"),
    ),
    ("bfloat16", {"enabled": True}, ("use engine.deepspeed.bf16",)),
    ("zero_optimization.cpu_offload", True, ("use engine.offload_optimizer",)),
    (
        "zero_optimization.prefetch_bucket_size",
        1,
        ("use engine.deepspeed.zero_optimization.stage3_prefetch_bucket_size",),
    ),
    ("zero_optimization.allgather_partitions", False, ("has no effect",)),
    ("disable_allgather", True, ("has no effect",)),
]

# What `owned` refuses: keys down to the value, value, the field of ours or the reason.
OWNED: list[tuple[str, Any, str]] = [
    ("train_batch_size", 8, "use train.global_batch"),
    ("train_micro_batch_size_per_gpu", 8, "use train.micro_batch"),
    ("gradient_accumulation_steps", 2, "use train.global_batch and train.micro_batch"),
    ("gradient_clipping", 0.5, "engine.deepspeed.gradient_clipping: set by train.grad_clip; use train.grad_clip"),
    ("bf16.enabled", True, "use train.precision"),
    ("fp16.enabled", False, "use train.precision"),
    ("torch_autocast", {"enabled": True}, "use train.precision"),
    ("zero_optimization.stage", 3, "use engine.stage"),
    ("zero_optimization.overlap_comm", True, "use engine.overlap_comm"),
    ("zero_optimization.offload_optimizer.device", "cpu", "use engine.offload_optimizer"),
    ("zero_optimization.offload_param.nvme_path", "/nvme", "use engine.nvme_path"),
    ("optimizer", {"type": "AdamW", "params": {"lr": 1e-4}}, "use optimizer"),
    ("scheduler", {"type": "WarmupLR"}, "use schedule"),
    ("steps_per_print", 10, "use logger.log_every"),
    ("wandb", {"enabled": True}, "use logger.wandb"),
    ("activation_checkpointing", {"cpu_checkpointing": True}, "use train.activation_checkpointing"),
    ("zero_allow_untested_optimizer", False, "set by bigtrain"),
    ("checkpoint.writer", {"type": "fast"}, "bigtrain writes checkpoints itself"),
    ("bf16.bf16_master_weights_and_grads", True, "fp32"),
    ("tensor_parallel", {"autotp_size": 2}, "data-parallel only"),
]

# Options that mean nothing at a ZeRO stage: keys down to the value, value, stage, words.
WRONG_STAGE: list[tuple[str, Any, int, str]] = [
    ("zero_optimization.stage3_prefetch_bucket_size", 1, 2, "needs ZeRO stage 3, not engine.stage=2"),
    ("zero_optimization.zero_hpz_partition_size", 2, 1, "needs ZeRO stage 3, not engine.stage=1"),
    ("zero_optimization.offload_param", {"pin_memory": True}, 2, "needs ZeRO stage 3"),
    ("zero_optimization.offload_optimizer.ratio", 0.5, 2, "needs ZeRO stage 3"),
    ("zero_optimization.round_robin_gradients", True, 3, "needs ZeRO stage 1 or 2, not engine.stage=3"),
    ("zero_optimization.reduce_bucket_size", 1, 0, "needs ZeRO stage 1 or 2 or 3, not engine.stage=0"),
    ("aio", {"block_size": 1}, 1, "needs ZeRO stage 3"),
    ("bf16.immediate_grad_update", True, 2, "needs ZeRO stage 1"),
    ("data_types.grad_accum_dtype", "fp32", 0, "needs ZeRO stage 1 or 2 or 3"),
    ("prescale_gradients", True, 2, "not possible with reduce-scatter"),
]


def nest(dotted: str, value: Any) -> dict[str, Any]:
    """nest("a.b", 1) is {"a": {"b": 1}}."""
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize("name", VALID)
def test_fine_tuning_passes(name: str) -> None:
    stage, section = VALID[name]
    schema.validate(section)
    schema.owned(section)
    schema.check_stage(section, stage)


@pytest.mark.parametrize(("key", "value", "words"), INVALID)
def test_what_deepspeed_would_misread_is_an_error(key: str, value: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as raised:
        schema.validate(nest(key, value))
    assert str(raised.value).startswith(f"engine.deepspeed.{key}")
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(("key", "value", "words"), OWNED)
def test_what_bigtrain_sets_cannot_be_contradicted(key: str, value: Any, words: str) -> None:
    section = nest(key, value)
    schema.validate(section)  # DeepSpeed would take it
    with pytest.raises(ConfigError) as raised:
        schema.owned(section)
    assert str(raised.value).startswith(f"engine.deepspeed.{key}: ")
    assert words in str(raised.value)


@pytest.mark.parametrize(("key", "value", "stage", "words"), WRONG_STAGE)
def test_an_option_needs_its_stage(key: str, value: Any, stage: int, words: str) -> None:
    section = nest(key, value)
    schema.validate(section)
    schema.owned(section)
    with pytest.raises(ConfigError) as raised:
        schema.check_stage(section, stage)
    assert str(raised.value).startswith(f"engine.deepspeed.{key}")
    assert words in str(raised.value)
    for fitting in schema.STAGES.get(key, ()):
        schema.check_stage(section, fitting)


def test_path_is_the_callers() -> None:
    with pytest.raises(ConfigError, match=r"did you mean ds\.fp16\.hysteresis\?"):
        schema.validate({"fp16": {"hysteresi": 2}}, path="ds")
    with pytest.raises(ConfigError, match=r"use ds\.zero_optimization\.stage3_max_live_parameters"):
        schema.validate({"zero_optimization": {"max_live_parameters": 2}}, path="ds")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("offload", ["none", "nvme"])
def test_what_bigtrain_itself_writes_is_valid(stage: int, offload: str) -> None:
    from bigtrain.config import Config, DeepSpeedConfig
    from bigtrain.engine.deepspeed import ds_config

    engine = DeepSpeedConfig(stage=stage, offload_optimizer=offload, offload_parameters=offload, nvme_path="/nvme")  # type: ignore[arg-type]
    schema.validate(ds_config(Config(engine=engine), world_size=1, device="cpu"))


def test_the_parent_stays_light() -> None:
    """The import passes through bigtrain/engine/__init__.py, which must not need torch either."""
    code = (
        "import sys; from bigtrain.engine.deepspeed_schema import validate; validate({'fp16': {'hysteresis': 2}}); "
        "sys.exit(' '.join({'torch', 'deepspeed', 'pydantic'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------- the table against the real DeepSpeed

# Keys that DeepSpeed reads later than in DeepSpeedConfig, and the source file that does.
READ_LATER = {
    "sequence_parallel_size": "__init__.py",
    "data_parallel_size": "__init__.py",
    "pipeline.use_reentrant": "runtime/pipe/engine.py",
    "data_efficiency.data_sampling.curriculum_learning.data_cluster_path": "runtime/data_pipeline/constants.py",
    "data_efficiency.data_sampling.curriculum_learning.curriculum_metrics": "runtime/data_pipeline/constants.py",
    "data_efficiency.data_sampling.dynamic_batching.metrics_path": "runtime/data_pipeline/constants.py",
    "data_efficiency.data_sampling.dynamic_batching.max_tokens": "runtime/data_pipeline/constants.py",
} | {
    f"data_efficiency.data_routing.random_ltd.{name}": "runtime/data_pipeline/constants.py"
    for name in (
        "total_layer_num", "random_ltd_layer_num", "random_ltd_layer_id", "model_mask_name", "model_type",
        "hidden_state_order", "random_ltd_schedule", "layer_token_lr_schedule",
    )
}  # fmt: skip

# Where our type is narrower than the model's annotation, as its validators, its comments or arithmetic want it:
# the type that the annotation says.
WIDER_IN_DEEPSPEED = {
    "zero_optimization.stage": "0 or 1 or 2 or 3",
    "zero_optimization.zero_hpz_partition_size": "whole>=0",
    "zero_optimization.stage3_module_granularity_threshold": "whole",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "number>=0<=1",
    "zero_optimization.zenflow.select_strategy": "text",
    "zero_optimization.zenflow.select_interval": "text or whole",
    "zero_optimization.zenflow.update_interval": "text or whole",
    "zero_optimization.zenflow.full_warm_up_rounds": "whole",
    "zero_optimization.leaf_module.classes": "texts",  # one text will do: a validator makes the list
    "zero_optimization.leaf_module.names": "texts",
    "zero_optimization.leaf_module.name_suffixes": "texts",
    "fp16.loss_scale": "number",
    "fp16.initial_scale_power": "whole",
    "fp16.loss_scale_window": "whole",
    "fp16.hysteresis": "whole",
    "fp16.min_loss_scale": "whole",
    "comms_logger.prof_ops": "list",
    "comet.samples_log_interval": "whole",
    "comet.mode": "text or null",
    "compile.free_activation_threshold": "whole",
    "hybrid_engine.inference_tp_size": "whole",
    "hybrid_engine.tp_gather_partition_size": "whole",
    "weight_quantization.num_bits": "whole",
    "weight_quantization.q_groups": "whole",
    "tensor_parallel.autotp_size": "whole",
    "tensor_parallel.tp.tp_size": "whole",
    "tensor_parallel.tp.tp_grain_size": "whole",
}


def models() -> dict[str, Any]:
    """Every section that DeepSpeed parses with a pydantic model of its own."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    monitors = {name: field.annotation for name, field in DeepSpeedMonitorConfig.model_fields.items()}
    return monitors | {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "hybrid_engine": HybridEngineConfig,
        "weight_quantization": WeightQuantConfig,
        "tensor_parallel": TPTrainingConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }


def lookup(dotted: str) -> Any:
    """The table's entry at a dotted name, or None."""
    entry: Any = schema.options()
    for key in dotted.split("."):
        entry = entry.get(key, entry.get(f"{key}?")) if isinstance(entry, dict) else None
    return entry


def leaves(table: dict[str, Any], prefix: str = "") -> set[str]:
    """Every option of the table, dotted, without the sections themselves."""
    found = set()
    for key, entry in table.items():
        name = prefix + key.rstrip("?")
        found |= leaves(entry, f"{name}.") if isinstance(entry, dict) else {name}
    return found


def type_of(annotation: Any, bounds: str = "") -> str | None:
    """A pydantic field's annotation in the words of the table; None for what YAML cannot hold."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        kinds = [type_of(arg, bounds) for arg in args]
        return None if None in kinds else " or ".join(str(kind) for kind in kinds)
    if origin is typing.Literal:
        return " or ".join(args)
    if origin is list:
        return "texts"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return " or ".join(str(member.value) for member in annotation)
    names = {bool: "bool", int: "whole", float: "number", str: "text", Path: "text", type(None): "null"}
    names |= {list: "list", tuple: "list", dict: "dict"}
    name = names.get(origin or annotation)
    return name + bounds if name in ("whole", "number") else name


def section_of(annotation: Any) -> Any:
    """The pydantic model inside an annotation (`Model` or `Optional[Model]`), or None."""
    from pydantic import BaseModel

    for member in (annotation, *typing.get_args(annotation)):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return member
    return None


def check_model(model: Any, path: str, problems: list[str]) -> None:
    """Compare a model's fields, their types, defaults and second names with the table's section at `path`."""
    if model.model_config.get("extra") != "forbid":
        problems.append(f"{path}: {model.__name__} takes unknown keys now")
    fields = set()
    for name, field in model.model_fields.items():
        key = field.alias or name
        if key != name and f"{path}.{name}" not in schema.RENAMED:
            problems.append(f"{path}.{name}: second name of {key}, add it to RENAMED")
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("deprecated"):
            if f"{path}.{key}" not in schema.RENAMED:
                problems.append(f"{path}.{key}: deprecated, add it to RENAMED")
            continue
        inner, found = section_of(field.annotation), lookup(f"{path}.{key}")
        if inner is not None:
            fields.add(key)
            if not isinstance(found, dict):
                problems.append(f"{path}.{key}: a new section ({inner.__name__}), add it")
                continue
            nullable = type(None) in typing.get_args(field.annotation)
            if nullable != (f"{key}?" in lookup(path)):
                problems.append(f"{path}.{key}: may be null: {nullable}")
            check_model(inner, f"{path}.{key}", problems)
            continue
        signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
        bounds = "".join(
            f"{sign}{getattr(item, attribute):g}"
            for item in field.metadata
            for attribute, sign in signs.items()
            if hasattr(item, attribute)
        )
        wanted = type_of(field.annotation, bounds)
        if wanted is None or field.exclude:  # a Python object, or one that DeepSpeed says users must not set
            continue
        fields.add(key)
        if found is None:
            problems.append(f'{path}.{key}: a new option, add "{key}": "{wanted}"')
            continue
        if WIDER_IN_DEEPSPEED.get(f"{path}.{key}", found) != wanted:
            problems.append(f"{path}.{key}: the table says {found!r}, DeepSpeed {wanted!r}")
        default = field.get_default(call_default_factory=True)
        default = default.value if isinstance(default, enum.Enum) else default
        if not any(schema._fits(default, kind) for kind in found.split(" or ")):
            problems.append(f"{path}.{key}: DeepSpeed's default {default!r} is no {found!r}")
    for key in sorted({key.rstrip("?") for key in lookup(path)} - fields):
        problems.append(f"{path}.{key}: gone from {model.__name__}, remove it from the table")


def test_pydantic_sections_are_deepspeeds() -> None:
    problems: list[str] = []
    for path, model in models().items():
        check_model(model, path, problems)
    assert not problems, "change deepspeed_options.json or deepspeed_schema.py:\n" + "\n".join(problems)


class Recorder(dict):  # type: ignore[type-arg]
    """A ds_config, or a section of one, that notes every key it is asked for."""

    def __init__(self, table: dict[str, Any], prefix: str, seen: set[str]) -> None:
        sections = {key.rstrip("?"): entry for key, entry in table.items() if isinstance(entry, dict)}
        super().__init__({key: Recorder(entry, f"{prefix}{key}.", seen) for key, entry in sections.items()})
        self.prefix, self.seen = prefix, seen

    def __contains__(self, key: object) -> bool:
        self.seen.add(f"{self.prefix}{key}")
        return super().__contains__(key)

    def __getitem__(self, key: Any) -> Any:
        self.seen.add(f"{self.prefix}{key}")
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self.seen.add(f"{self.prefix}{key}")
        return super().get(key, default)

    def keys(self) -> Any:
        return self  # so that `key in section.keys()` is noted too


def test_every_key_that_deepspeed_reads_is_in_the_table_and_no_other() -> None:
    """The dict-based sections: hand DeepSpeedConfig a config that notes what it is asked for."""
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig, get_pipeline_config

    seen: set[str] = set()
    probe = Recorder(schema.options(), "", seen)
    # What it takes for DeepSpeed to read on: a batch size, kinds, a section that is not empty.
    probe |= {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    dict.__getitem__(probe, "optimizer")["type"] = "AdamW"
    dict.__getitem__(probe, "scheduler")["type"] = "WarmupLR"
    dict.__getitem__(probe, "expert_parallel")["enabled"] = False
    DeepSpeedConfig(probe)
    seen |= {f"pipeline.{key}" for key in get_pipeline_config({})}  # it copies whatever a user gives

    source = Path(inspect.getfile(deepspeed)).parent
    for name, file in READ_LATER.items():
        word = name.rpartition(".")[2]
        assert f'"{word}"' in (text := (source / file).read_text()) or f"'{word}'" in text, f"{name} is not in {file}"

    sections = {name for name in seen if isinstance(lookup(name), dict)}
    by_model = tuple(f"{path}." for path in models())
    read = {name for name in seen - sections | set(READ_LATER) if not name.startswith(by_model)}
    known = {name for name in leaves(schema.options()) if not name.startswith(by_model)}
    new = read - known - set(schema.REMOVED) - set(schema.RENAMED)
    assert not new, f"DeepSpeed reads these too, add them to deepspeed_options.json: {sorted(new)}"
    assert not known - read, f"DeepSpeed does not read these, remove them: {sorted(known - read)}"


def test_removed_options_are_deepspeeds() -> None:
    from deepspeed.runtime import config

    theirs = set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    theirs |= {f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS}
    assert set(schema.REMOVED) == theirs


def test_the_tables_name_options_that_exist() -> None:
    named = [*schema.SET_BY, *schema.OUT_OF_PLACE, *schema.STAGES, *schema.WITHOUT_EFFECT, *WIDER_IN_DEEPSPEED]
    assert [name for name in named if lookup(name) is None] == []
    assert [name for name in (*schema.RENAMED, *schema.REMOVED) if lookup(name) is not None] == []
    targets = [way_out.removeprefix("{path}.") for way_out in schema.RENAMED.values() if way_out.startswith("{")]
    assert [name for name in targets if lookup(name) is None] == []


def test_the_fields_that_are_named_exist() -> None:
    from bigtrain.config import Config, DeepSpeedConfig, to_dict

    ways_out = {*schema.SET_BY.values(), *schema.RENAMED.values(), *schema.REMOVED.values()}
    fields = {word.rstrip(":") for way_out in ways_out for word in way_out.split()}
    sections = {"engine", "logger", "train"}
    for field in sorted(field for field in fields if field.partition(".")[0] in sections):
        entry: Any = to_dict(Config(engine=DeepSpeedConfig()))
        for key in field.split("."):
            assert key in entry, field
            entry = entry[key]


def test_valid_examples_are_taken_by_deepspeed() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    for name, (stage, section) in VALID.items():
        zero = {"stage": stage} | section.get("zero_optimization", {})
        parsed = DeepSpeedConfig({"train_batch_size": 1} | section | {"zero_optimization": zero})
        assert parsed.zero_optimization_stage == stage, name


def test_stages_are_those_of_the_engine() -> None:
    """Each option that DeepSpeedEngine hands to one of its two ZeRO optimizers only is in STAGES as such."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    tree = ast.parse(textwrap.dedent(inspect.getsource(DeepSpeedEngine._configure_zero_optimizer)))
    branches = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    [choice] = [node for node in branches if ast.unparse(node.test).startswith("zero_stage <=")]
    [stage_3] = choice.orelse

    def accessors(nodes: list[ast.stmt]) -> set[str]:
        calls = [node for part in nodes for node in ast.walk(part) if isinstance(node, ast.Call)]
        return {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)}

    assert isinstance(stage_3, ast.If)
    one_two, three = accessors(choice.body), accessors(stage_3.body)
    renamed = {"zero_multi_rank_bucket_allreduce": "use_multi_rank_bucket_allreduce"}
    table = lookup("zero_optimization")
    checked = 0
    for accessor in one_two ^ three:
        name = renamed.get(accessor, accessor.removeprefix("zero_"))
        for option in (name, f"zero_{name}", f"stage3_{name}", f"offload_optimizer.{name}"):
            if option in table or f"{option}?" in table or lookup(f"zero_optimization.{option}") is not None:
                expected = (1, 2) if accessor in one_two else (3,)
                assert schema._stages(f"zero_optimization.{option}") == expected, option
                checked += 1
    assert checked >= 20


def test_options_without_effect_still_have_none() -> None:
    from deepspeed.runtime import engine

    source = inspect.getsource(engine)
    assert "disable_allgather" not in source
    assert source.count("zero_allgather_partitions") == 1  # its definition: nothing calls it
