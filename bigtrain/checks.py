"""The rules of a config that need more than one field, or a range. Imports neither torch nor DeepSpeed."""

from __future__ import annotations

from importlib.util import find_spec

from bigtrain import privacy
from bigtrain.compress import compatibility, prune_checks
from bigtrain.config import (
    LABELLED_TASKS,
    AccelerateConfig,
    AdafactorConfig,
    AdamW8bitConfig,
    AdamWConfig,
    ClassificationConfig,
    Config,
    DecoderConfig,
    EncoderConfig,
    HuggingFaceConfig,
    LabelledDataConfig,
    Llama3ScalingConfig,
    MaskedLMConfig,
    ModelConfig,
    MuonConfig,
    QuestionAnsweringConfig,
    RopeScalingConfig,
    Seq2SeqConfig,
    TextDataConfig,
    TrainConfig,
    WandbConfig,
    head_dim,
    micro_batch,
    objective_names,
)
from bigtrain.errors import ConfigError

TRACKERS = {"tensorboard": "tensorboard", "csv": "csv", "mlflow": "mlflow"}  # name -> the module it needs
LEAST_HISTORY = 16  # losses, before one can be called a spike


def check(config: Config) -> None:
    """The rules that need more than one field, or a range. Raises ConfigError at the first that is broken."""
    _check_model(config.model)
    _check_task(config)
    _check_data(config)
    _check_engine(config)
    _check_optimization(config)
    _check_train(config)
    _check_launch(config)
    _check_compress(config)
    _check_distil(config)
    _check_quantize(config)
    privacy.check(config)


def _positive(path: str, value: float | None, least: float = 1) -> None:
    if value is not None and not value >= least:
        raise ConfigError(path, value, f"must be at least {least:g}")


def _fraction(path: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(path, value, "must be at least 0 and below 1")


def _check_model(model: ModelConfig) -> None:
    sizes = ("dim", "n_layers", "n_decoder_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size")
    for name in (*sizes, "max_seq_len"):
        _positive(f"model.{name}", getattr(model, name, None))
    if isinstance(model, HuggingFaceConfig):
        return  # the rest is between its config.json and transformers
    _fraction("model.dropout", model.dropout)
    _positive("model.init_std", model.init_std, 0)
    if model.dim % model.n_heads and getattr(model, "head_dim", None) is None:
        raise ConfigError("model.dim", model.dim, f"not divisible by model.n_heads={model.n_heads}")
    n_kv_heads = (isinstance(model, DecoderConfig) and model.n_kv_heads) or model.n_heads
    if model.n_heads % n_kv_heads:
        raise ConfigError("model.n_heads", model.n_heads, f"not divisible by model.n_kv_heads={n_kv_heads}")
    if isinstance(model, Seq2SeqConfig):
        if model.dim % 2:
            raise ConfigError("model.dim", model.dim, "must be even: positions are pairs of a sine and a cosine")
    elif model.positions == "rotary" and head_dim(model) % 2:
        size = "model.head_dim" if model.head_dim else "dim/n_heads"
        raise ConfigError("model.positions", "rotary", f"needs an even head size, but {size} is {head_dim(model)}")
    if isinstance(model, DecoderConfig) and model.rope_scaling is not None:
        _check_rope_scaling(model, model.rope_scaling)


def _check_rope_scaling(model: DecoderConfig, scaling: RopeScalingConfig) -> None:
    at = "model.rope_scaling"
    if model.positions != "rotary":
        raise ConfigError(at, scaling.kind, f"model.positions={model.positions}: there are no turns to slow down")
    if not 1 <= scaling.factor < float("inf"):
        raise ConfigError(f"{at}.factor", scaling.factor, "must be 1 or more: how many times as long contexts get")
    if isinstance(scaling, Llama3ScalingConfig):
        _positive(f"{at}.original_max_seq_len", scaling.original_max_seq_len)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        if not 0 < low < high < float("inf"):
            raise ConfigError(f"{at}.low_freq_factor", low, f"must be above 0 and below high_freq_factor={high}")


def _check_task(config: Config) -> None:
    """Which model a task needs, which data, and the ranges of its own fields."""
    task, model, data = config.task, config.model, config.data
    wanted = {"causal_lm": "decoder", "instruction": "decoder", "translation": "seq2seq"}.get(task.kind, "encoder")
    if isinstance(model, HuggingFaceConfig):
        _check_huggingface(config)
    elif model.kind != wanted:
        choice = {"decoder": "gpt_mini", "seq2seq": "transformer_tiny"}.get(wanted, "bert_mini")
        raise ConfigError(
            "model.kind", model.kind, f"task={task.kind} needs a model of kind {wanted}", f"take model={choice}"
        )
    other = TextDataConfig if isinstance(task, LABELLED_TASKS) else LabelledDataConfig
    if isinstance(data, other):
        fitting = "labelled" if isinstance(task, LABELLED_TASKS) else "text"
        problem = f"is not what task={task.kind} learns from"
        raise ConfigError("data.kind", data.kind, problem, f"take data={fitting} or data=stdlib")
    for name in ("label_smoothing", "dropout", "token_dropout", "token_swap", "token_deletion"):
        _fraction(f"task.{name}", getattr(task, name, 0.0))
    _positive("task.z_loss", getattr(task, "z_loss", None), 0)
    _positive("task.max_length", getattr(task, "max_length", None), 8)
    for name in ("max_new_tokens", "num_beams", "adversarial_steps"):
        _positive(f"task.{name}", getattr(task, name, None))
    epsilon = getattr(task, "adversarial_epsilon", 1.0)
    if not 0 < epsilon < float("inf"):
        raise ConfigError("task.adversarial_epsilon", epsilon, "must be above 0")
    if isinstance(task, QuestionAnsweringConfig):
        _check_windows(task, model)
    if isinstance(task, MaskedLMConfig):
        if not 0 < task.mask_fraction < 1:
            raise ConfigError("task.mask_fraction", task.mask_fraction, "must be above 0 and below 1")
        if isinstance(model, EncoderConfig) and task.sentence != "none" and model.token_types < 2:
            raise ConfigError(
                "model.token_types", model.token_types, f"task.sentence={task.sentence} needs two segments"
            )
        if model.max_seq_len < 16:
            raise ConfigError("model.max_seq_len", model.max_seq_len, "too short for two segments", "take at least 16")


def _check_huggingface(config: Config) -> None:
    """What transformers' classes do not have, or what is found by our own models' names."""
    if isinstance(config.task, MaskedLMConfig) and config.task.sentence != "none":
        raise ConfigError(
            "task.sentence", config.task.sentence, "model=hf has a head for masked tokens only",
            "set task.sentence=none, or take model=pretrained if it is a BERT",
        )  # fmt: skip
    if getattr(config.data, "isolate_documents", False):
        raise ConfigError("data.isolate_documents", True, "model=hf attends across documents", "set it to false")
    if isinstance(config.optimizer, MuonConfig):
        raise ConfigError("optimizer.kind", "muon", "cannot tell model=hf's hidden matrices from the others")


def _check_windows(task: QuestionAnsweringConfig, model: ModelConfig) -> None:
    """A window needs room for a question, and for more of the context than it shares with the one before."""
    _positive("task.stride", task.stride, 0)
    _positive("task.max_answer_length", task.max_answer_length)
    name, length = "model.max_seq_len", model.max_seq_len
    if task.max_length is not None and task.max_length < length:
        name, length = "task.max_length", task.max_length
    if length < 32:
        raise ConfigError(name, length, "too short for a question and its context", "take at least 32")
    if task.stride > length // 2:
        raise ConfigError(
            "task.stride", task.stride, f"more than half of a window ({name}={length})", f"take at most {length // 2}"
        )


def _check_data(config: Config) -> None:
    data = config.data
    _positive("data.workers", data.workers)
    _positive("data.tokenizer.train_mib", data.tokenizer.train_mib)
    if not 0 < data.held_out < 1:
        raise ConfigError("data.held_out", data.held_out, "must be above 0 and below 1")
    if data.tokenizer.path is None and data.tokenizer.vocab_size < 257:
        raise ConfigError(
            "data.tokenizer.vocab_size",
            data.tokenizer.vocab_size,
            "a byte-level BPE needs at least 257 (256 bytes and the end-of-text token)",
        )
    if isinstance(data, (TextDataConfig, LabelledDataConfig)) and not data.path:
        raise ConfigError("data.path", data.path, "missing", "name a file, directory, glob or Hugging Face dataset")
    if (
        data.tokenizer.path is None
        and config.model.vocab_size is not None
        and config.model.vocab_size < data.tokenizer.vocab_size
    ):
        raise ConfigError(
            "model.vocab_size", config.model.vocab_size,
            f"smaller than data.tokenizer.vocab_size={data.tokenizer.vocab_size}",
            "raise it or leave it null to follow the tokenizer",
        )  # fmt: skip


def _check_engine(config: Config) -> None:
    engine, optimizer = config.engine, config.optimizer
    if isinstance(engine, AccelerateConfig):
        if config.train.precision == "fp16":
            raise ConfigError(
                "train.precision",
                "fp16",
                "engine=accelerate does not keep fp32 master weights in fp16",
                "take bf16 or fp32",
            )
        if engine.parallel == "fsdp2" and not isinstance(optimizer, (AdamWConfig, AdamW8bitConfig)):
            raise ConfigError(
                "optimizer.kind", optimizer.kind, "does not take FSDP2's sharded tensors", "take engine.parallel=ddp"
            )
        return
    if engine.stage not in (0, 1, 2, 3):
        raise ConfigError("engine.stage", engine.stage, "not a ZeRO stage", "one of 0, 1, 2, 3")
    if engine.stage > 0 and isinstance(optimizer, AdafactorConfig):
        raise ConfigError(
            "optimizer.kind", "adafactor", "its statistics are of whole matrices, which ZeRO cuts into flat shards",
            "take engine=zero0, engine=accelerate or another optimizer",
        )  # fmt: skip
    if engine.stage > 0 and isinstance(optimizer, MuonConfig) and config.train.grad_clip:
        raise ConfigError(
            "train.grad_clip", config.train.grad_clip,
            "under ZeRO it would clip Muon's orthogonalised update, not the gradient, and all but stop it",
            "set train.grad_clip=0",
        )  # fmt: skip
    _positive("engine.bucket_mib", engine.bucket_mib)
    if engine.offload_parameters != "none" and engine.stage != 3:
        raise ConfigError(
            "engine.offload_parameters", engine.offload_parameters, f"needs engine.stage=3, not {engine.stage}"
        )
    if engine.offload_optimizer != "none" and engine.stage == 0:
        raise ConfigError(
            "engine.offload_optimizer", engine.offload_optimizer, "needs engine.stage of 1 or more, not 0"
        )
    if engine.offload_optimizer == "nvme" and engine.stage != 3:
        raise ConfigError(
            "engine.offload_optimizer", "nvme", f"needs engine.stage=3, not {engine.stage}", "take cpu or stage 3"
        )
    if engine.quantized_communication and engine.stage != 3:
        raise ConfigError("engine.quantized_communication", True, f"needs engine.stage=3, not {engine.stage}")
    if "nvme" in (engine.offload_optimizer, engine.offload_parameters) and not engine.nvme_path:
        raise ConfigError("engine.nvme_path", engine.nvme_path, "missing", "name a directory on the NVMe disk")


def _check_optimization(config: Config) -> None:
    optimizer, schedule = config.optimizer, config.schedule
    if not 0 < optimizer.lr < float("inf"):
        raise ConfigError("optimizer.lr", optimizer.lr, "must be above 0")
    _positive("optimizer.weight_decay", optimizer.weight_decay, 0)
    for name in ("beta1", "beta2", "momentum"):
        if hasattr(optimizer, name):
            _fraction(f"optimizer.{name}", getattr(optimizer, name))
    _positive("schedule.warmup_steps", schedule.warmup_steps, 0)
    if schedule.warmup_steps > config.train.steps:
        raise ConfigError(
            "schedule.warmup_steps", schedule.warmup_steps, f"longer than the run (train.steps={config.train.steps})"
        )
    if not 0 <= schedule.final_ratio <= 1:
        raise ConfigError("schedule.final_ratio", schedule.final_ratio, "must be from 0 to 1")
    if not 0 < schedule.decay_fraction <= 1:
        raise ConfigError("schedule.decay_fraction", schedule.decay_fraction, "must be above 0 and at most 1")


def _check_train(config: Config) -> None:
    train = config.train
    for name in ("steps", "global_batch", "micro_batch", "eval_batches", "keep_checkpoints"):
        _positive(f"train.{name}", getattr(train, name))
    for name in ("seed", "grad_clip", "eval_every", "save_every", "keep_every"):
        _positive(f"train.{name}", getattr(train, name), 0)
    _positive("logger.log_every", config.logger.log_every)
    _positive("logger.wandb.stall_seconds", config.logger.wandb.stall_seconds, 0)
    if config.logger.wandb.enabled:
        _check_wandb(config.logger.wandb)
    if "mlflow" in config.logger.trackers and not config.logger.mlflow_experiment.strip():
        raise ConfigError("logger.mlflow_experiment", config.logger.mlflow_experiment, "empty", "name an experiment")
    for name in config.logger.trackers:
        if name not in TRACKERS:
            raise ConfigError("logger.trackers", name, "unknown", f"of {', '.join(TRACKERS)}")
        if find_spec(TRACKERS[name]) is None:
            raise ConfigError(
                "logger.trackers", name, f"needs the package {TRACKERS[name]}", "pip install 'bigtrain[trackers]'"
            )
    if not 0 < train.layer_lr_decay <= 1:
        raise ConfigError("train.layer_lr_decay", train.layer_lr_decay, "must be above 0 and at most 1")
    _positive("train.lora.rank", train.lora.rank, 0)
    _fraction("train.lora.dropout", train.lora.dropout)
    if train.lora.rank and config.init_from is None:
        raise ConfigError(
            "train.lora.rank",
            train.lora.rank,
            "LoRA adapts a trained model",
            "name one: model=pretrained model.path=DIR",
        )
    _check_guard(train)
    for name in ("start_step", "steps"):
        _positive(f"train.profile.{name}", getattr(train.profile, name), 0)
    if train.tokens_per_parameter is not None and not 0 < train.tokens_per_parameter < float("inf"):
        raise ConfigError("train.tokens_per_parameter", train.tokens_per_parameter, "must be above 0")
    if not objective_names(train.objective):
        raise ConfigError("train.objective", train.objective, "empty", "name a number of result.json, like eval/loss")
    if config.resume == "":
        raise ConfigError("resume", config.resume, "empty", "auto, required, never, or a directory")


def _check_wandb(wandb: WandbConfig) -> None:
    """What wandb would refuse when the ranks have started, or its server when the run is uploaded."""
    if find_spec("wandb") is None:
        raise ConfigError("logger.wandb.enabled", True, "needs the package wandb", "pip install wandb")
    limits = {"project": 128, "entity": 128, "name": 128, "group": 128, "job_type": 128}
    texts = {f"logger.wandb.{name}": (getattr(wandb, name), limit) for name, limit in limits.items()}
    texts |= {f"logger.wandb.tags[{number}]": (tag, 64) for number, tag in enumerate(wandb.tags)}
    for field, (text, limit) in texts.items():
        if text is not None and not text.strip():
            raise ConfigError(field, text, "empty", "name one, or leave it out")
        if text is not None and len(text) > limit:
            raise ConfigError(field, text, f"has {len(text)} characters, wandb takes {limit}")
    for name in ("project", "entity"):
        refused = [sign for sign in "/\\#?%:" if sign in (getattr(wandb, name) or "")]
        if refused:
            way_out = "a team is logger.wandb.entity" if name == "project" and refused == ["/"] else ""
            raise ConfigError(
                f"logger.wandb.{name}", getattr(wandb, name), f"wandb takes no {' '.join(refused)} in it", way_out
            )


def _check_guard(train: TrainConfig) -> None:
    guard = train.guard
    _positive("train.stop_at", train.stop_at)
    for name in ("spike_window", "max_spikes"):
        _positive(f"train.guard.{name}", getattr(guard, name))
    _positive("train.guard.spike_deviations", guard.spike_deviations, 1)
    _positive("train.guard.skip_steps", guard.skip_steps, 0)
    _positive("train.guard.replay_every", guard.replay_every, 0)
    if guard.spike_window < LEAST_HISTORY:
        raise ConfigError(
            "train.guard.spike_window", guard.spike_window, f"a median of fewer than {LEAST_HISTORY} losses says little"
        )
    if guard.spike == "rollback" and not train.save_every:
        raise ConfigError(
            "train.guard.spike", "rollback", "there would be no checkpoint to go back to", "set train.save_every"
        )
    if guard.replay_every and not train.deterministic:
        raise ConfigError(
            "train.guard.replay_every", guard.replay_every, "two runs of a micro-batch may rightly differ",
            "set train.deterministic=true",
        )  # fmt: skip


def _check_compress(config: Config) -> None:
    if config.compress.prune is not None:
        prune_checks.check(config.compress.prune)
    compatibility.check(config)


def _check_distil(config: Config) -> None:
    """What can be told without the teacher; `compress/teacher.py` looks at that one once the data are prepared."""
    distil, task, at = config.compress.distil, config.task, "compress.distil"
    if distil is None:
        return
    if not distil.teacher:
        way_out = "name a run, a Hugging Face directory or a hub model"
        raise ConfigError(f"{at}.teacher", distil.teacher, "missing", way_out)
    if not 0 <= distil.alpha <= 1:
        raise ConfigError(f"{at}.alpha", distil.alpha, "must be from 0 to 1")
    if not 0 < distil.temperature < float("inf"):
        raise ConfigError(f"{at}.temperature", distil.temperature, "must be above 0")
    for name in ("logits", "hidden", "attention", "cache_top_k"):
        _positive(f"{at}.{name}", getattr(distil, name), 0)
    deep = "hidden" if distil.hidden else "attention" if distil.attention else ""
    if not (distil.logits or deep):
        raise ConfigError(f"{at}.logits", distil.logits, "nothing is learned from the teacher", "raise a weight")
    if task.kind == "question_answering":
        raise ConfigError(at, task.kind, "is not for this task: its answers are spans", "set compress=[]")
    if deep and task.kind == "translation":
        raise ConfigError(f"{at}.{deep}", getattr(distil, deep), "an encoder-decoder has two stacks of layers")
    if distil.attention and (isinstance(config.model, HuggingFaceConfig) or getattr(config.model, "unpadded", False)):
        what = "model=hf has layers of other names" if config.model.kind == "hf" else "model.unpadded packs texts"
        raise ConfigError(f"{at}.attention", distil.attention, what, "set it to 0")
    if isinstance(task, ClassificationConfig) and task.adversarial != "none":
        raise ConfigError("task.adversarial", task.adversarial, "the teacher sees the text as it is")
    if distil.teacher_sharded and isinstance(config.engine, AccelerateConfig):
        raise ConfigError(f"{at}.teacher_sharded", True, "is ZeRO-3's work", "take engine=zero3, or set it to false")
    if distil.cache_top_k:
        _check_cached(config, deep)


def _check_cached(config: Config, deep: str) -> None:
    """Only what is the same each time a sample comes can be kept."""
    assert config.compress.distil is not None
    k, task = config.compress.distil.cache_top_k, config.task
    changing = task.kind == "masked_lm" or (isinstance(task, ClassificationConfig) and task.token_dropout)
    regression = isinstance(task, ClassificationConfig) and task.regression
    for problem in (
        "other tokens are masked each time" if changing else "",
        "a regression has no tokens to choose from" if regression else "",
        f"compress.distil.{deep} looks inside the teacher" if deep else "",
    ):
        if problem:
            raise ConfigError("compress.distil.cache_top_k", k, problem, "set it to 0")


def _check_quantize(config: Config) -> None:
    quantize, float8, at = config.compress.quantize, config.compress.float8, "compress.quantize"
    for name in ("quantize", "float8"):
        if getattr(config.compress, name) is not None and config.train.lora.rank:
            problem = "trains beside frozen weights, which are not what would be quantized"
            raise ConfigError("train.lora.rank", config.train.lora.rank, problem, f"set compress.{name}=null")
    if float8 is not None:
        if quantize is not None:
            problem = f"computes the layers that {at} does"
            raise ConfigError("compress.float8", float8.recipe, problem, "take one of both")
        if config.train.precision == "fp16":
            raise ConfigError("train.precision", "fp16", "compress.float8 rounds bf16 or fp32", "take bf16")
    if quantize is None:
        return
    if quantize.bits not in (8, 4, 2):
        raise ConfigError(f"{at}.bits", quantize.bits, "not a width that can be had", "one of 8, 4, 2")
    _positive(f"{at}.group_size", quantize.group_size, 2)
    if quantize.activations and (quantize.bits != 8 or quantize.group_size is not None):
        problem = "int8 inputs are multiplied with rows of int8 weights"
        raise ConfigError(f"{at}.activations", True, problem, f"set {at}.bits=8 and {at}.group_size=null")
    _positive(f"{at}.start", quantize.start, 0)
    _positive(f"{at}.freeze", quantize.freeze, quantize.start)


def _check_launch(config: Config) -> None:
    launch = config.launch
    if launch.ranks is not None and launch.ranks < 1:
        raise ConfigError("launch.ranks", launch.ranks, "at least one rank is needed")
    for name in ("threads_per_rank", "timeout_seconds", "stop_seconds", "nodes", "min_nodes", "ssh_seconds"):
        _positive(f"launch.{name}", getattr(launch, name))
    for name in ("hang_seconds", "restarts", "clock_seconds"):
        _positive(f"launch.{name}", getattr(launch, name), 0)
    if launch.min_nodes is not None and launch.nodes is not None and launch.min_nodes > launch.nodes:
        raise ConfigError("launch.min_nodes", launch.min_nodes, f"more than launch.nodes={launch.nodes}")
    if launch.kind == "hostfile" and launch.hostfile is None:
        raise ConfigError(
            "launch.hostfile", None, "launch=hostfile wants one", "launch.hostfile=PATH, lines of `host slots=N`"
        )
    if launch.kind in ("local", "dryrun") and (launch.nodes or 1) > 1:
        raise ConfigError(
            "launch.nodes", launch.nodes, f"launch={launch.kind} is one machine", "take launch=hostfile or slurm"
        )
    if launch.master_port is not None and not 1024 <= launch.master_port <= 65535:
        raise ConfigError("launch.master_port", launch.master_port, "must be from 1024 to 65535")


def check_batch(config: Config, world_size: int) -> None:
    """The global batch must split into whole micro-batches on every rank. Raises ConfigError."""
    train = config.train
    if train.global_batch % world_size:
        raise ConfigError(
            "train.global_batch", train.global_batch, f"not divisible by the number of ranks, {world_size}"
        )
    if train.global_batch % (world_size * micro_batch(config, world_size)):
        raise ConfigError(
            "train.global_batch", train.global_batch,
            f"not divisible by ranks x train.micro_batch = {world_size} x {train.micro_batch}",
        )  # fmt: skip
