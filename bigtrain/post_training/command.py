"""`bigtrain compress`: what each recipe does to a trained model, in parameters, bytes, quality, time and energy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain import config as schema
from bigtrain import evaluate, tasks
from bigtrain.checkpoint import inference, newest
from bigtrain.compress import quantize
from bigtrain.compress_config import CompressConfig, DistilConfig, PruneConfig, QuantizeConfig
from bigtrain.config import Config
from bigtrain.data.example_loader import Share
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.export import export_quantized
from bigtrain.files import write_atomic
from bigtrain.launch import Stopped
from bigtrain.launch import train as launch
from bigtrain.models.stored import StoredTensors
from bigtrain.post_training import model_directory, oneshot, recipe, structure
from bigtrain.post_training.page import cells, write_page
from bigtrain.post_training.recipe import Recipe
from bigtrain.post_training.timer import Timer
from bigtrain.worker import LABELS

DENSE = "dense"
# The first of these that a task has is its quality; larger is better of all but the last.
QUALITIES = ("eval/accuracy", "eval/f1", "eval/spearman", "eval/bleu", "eval/masked_accuracy", "eval/perplexity")
FORMAT_OF = {"int8": "compressed-tensors", "int4": "compressed-tensors", "int8_dynamic": "torchao"}
CALIBRATION = 32  # examples or sequences of a calibration batch


@dataclass(frozen=True)
class Options:
    """What is asked for besides the recipes."""

    by: structure.Importance = "taylor"
    calibration_batches: int = 8
    recover_steps: int = 0
    lr: float | None = None  # of the recovery; None: the run's own
    distil: bool = False  # whether the recovery learns from the dense model too
    task: str | None = None  # of a Hugging Face directory ...
    data: tuple[str, ...] = ()  # ... with its data
    held_out: tuple[str, ...] = ()
    columns: tuple[tuple[str, str | int], ...] = ()
    watts: float | None = None  # of the machine at work, where it cannot be measured
    compile: bool = False  # time what torch.compile makes of the models
    batch: int = 32  # in evaluation


def run(path: Path, recipes: Sequence[str], out: Path, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Apply each recipe to the model of `path`, a run or a Hugging Face directory, and measure what comes of it.

    Writes out/<recipe>/, each a directory that other commands take for a run, compress.json, a picture and index.html.
    Returns what is in compress.json. Raises ConfigError for a recipe or data that cannot be used, before anything is
    written.
    """
    wanted = [recipe.parse(text) for text in recipes]
    out = out.expanduser().resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError("out", str(out), "exists already", "name a directory that is new or empty")
    if len({one.folder for one in wanted}) < len(wanted):
        raise ConfigError("RECIPE", " ".join(recipes), "names one twice")
    source = model_directory.open_source(
        path, out / DENSE, options.task, list(options.data), list(options.held_out), dict(options.columns)
    )
    config = launch.prepare_data(schema.load(source / "config.yaml"))
    bench = Bench(source, config, out, options, say)
    for one in wanted:
        bench.check(one)
    out.mkdir(parents=True, exist_ok=True)
    rows = [bench.dense()]
    say(table(rows, head=True))
    for one in wanted:
        rows.append(bench.apply(one))
        say(table(rows[-1:], head=False))
    found = {
        "source": str(path),
        "task": config.task.kind,
        "quality": rows[0]["quality_name"],
        "importance": options.by,
        "recover_steps": options.recover_steps,
        "machine": bench.timer.machine(),
        "rows": rows,
    }
    write_atomic(out / "compress.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_page(found, out)
    return found


class Bench:
    """A model and its data, on which recipes are tried one by one."""

    def __init__(self, source: Path, config: Config, out: Path, options: Options, say: Callable[[str], None]) -> None:
        self.source, self.config, self.out, self.options, self.say = source, config, out, options, say
        self.task: Any = tasks.build(config)
        self.timer = Timer(self.task, options.watts, options.compile)
        checkpoint = newest(source)
        assert checkpoint is not None
        self.checkpoint = checkpoint
        # What is written has the type of what it is made of, or bytes could not be compared; inference is in another.
        stored = StoredTensors(checkpoint)
        self.dtype = stored.tensor(stored.names[0]).dtype

    def check(self, wanted: Recipe) -> None:
        """Raises ConfigError for what this model does not have, as far as it shows without its weights."""
        if wanted.cut != structure.Cut():
            model = structure.supported(self.config.model)
            for part, there in (
                ("heads", structure.units(model)), ("neurons", structure.ffn_dim(model)),
                ("layers", model.n_layers), ("dim", model.dim),
            ):  # fmt: skip
                structure.amount(part, getattr(wanted.cut, part), there)

    def dense(self) -> dict[str, Any]:
        model = self.load(self.source, self.config)
        return self.row(DENSE, model, self.source, None)

    def apply(self, wanted: Recipe) -> dict[str, Any]:
        """One recipe from beginning to end; its row of the table."""
        model = self.load(self.source, self.config)
        config = self.config
        directory = self.out / wanted.folder
        if wanted.cut != structure.Cut():
            config = self._cut(model, wanted, directory)
            model = self.load(directory, config)
        if wanted.prune is not None:
            oneshot.prune(model, wanted.prune, self.batches(), self.task.loss)
            self._write(directory, config, model)
        if self.options.recover_steps and (wanted.cut != structure.Cut() or wanted.prune is not None):
            directory, config = self._recovered(wanted, directory, config)
            model = self.load(directory, config)
        if wanted.quantize is not None:
            scheme = quantize.PTQ[wanted.quantize]
            defaults = QuantizeConfig()
            if not directory.is_dir():
                self._write(directory, config, model)
            model = quantize.quantize(model, scheme, defaults.include, defaults.exclude, "RECIPE")
        return self.row(wanted.name, model, directory, wanted.quantize)

    # ------------------------------------------------------------------------------------------------- steps

    def _cut(self, model: nn.Module, wanted: Recipe, directory: Path) -> Config:
        batches = self.batches() if self.options.by != "magnitude" else []
        found = structure.importances(model, self.options.by, batches, self.task.loss)
        kept = structure.choose(self.config.model, wanted.cut, found)
        smaller, tensors = structure.shrink(self.config.model, kept, self._named(model))
        config = replace(self.config, model=smaller)
        model_directory.write(directory, config, smaller, tensors, self.source / "tokenizer", self.labels())
        return config

    def _write(self, directory: Path, config: Config, model: nn.Module) -> None:
        named = self._named(model)
        model_directory.write(directory, config, config.model, named, self.source / "tokenizer", self.labels())

    def _named(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return ((name, parameter.detach().to(self.dtype)) for name, parameter in model.named_parameters())

    def _recovered(self, wanted: Recipe, directory: Path, config: Config) -> tuple[Path, Config]:
        """Train on, as the run was, from what the recipe has left, and with its zeros held."""
        steps, run_dir = self.options.recover_steps, directory.with_name(f"{directory.name}-recovered")
        teacher = DistilConfig(teacher=str(self.source)) if self.options.distil else None
        training = replace(
            config,
            run_dir=str(run_dir),
            resume="auto",
            init_from=str(directory),
            train=replace(config.train, steps=steps, stop_at=None, eval_every=0, save_every=0),
            schedule=replace(config.schedule, warmup_steps=min(config.schedule.warmup_steps, steps // 10)),
            compress=CompressConfig(prune=wanted.prune and _held(wanted.prune), distil=teacher),
        )
        if self.options.lr is not None:
            training = replace(training, optimizer=replace(training.optimizer, lr=self.options.lr))
        try:
            launch.train(
                launch.checked(schema.to_dict(training)), self.say, lambda run: f"bigtrain compress (in {run})"
            )
        except Stopped:
            raise BigtrainError(f"stopped while {run_dir} was training; nothing was compared") from None
        return run_dir, schema.load(run_dir / "config.yaml")

    # ----------------------------------------------------------------------------------------------- measuring

    def load(self, directory: Path, config: Config) -> nn.Module:
        checkpoint = newest(directory)
        assert checkpoint is not None
        model, self.device = inference.load(lambda: self.task.build_model(config.model), checkpoint, "auto")
        return model

    def batches(self) -> list[Any]:
        """Calibration batches, of the training data."""
        share = Share(0, 1, CALIBRATION, CALIBRATION, self.config.train.seed)
        loader = self.task.train_loader(share)
        found = [batch for step in range(self.options.calibration_batches) for batch in loader.batches(step)]
        return [{name: tensor.to(self.device) for name, tensor in batch.items()} for batch in found]

    def labels(self) -> Any:
        path = self.source / LABELS
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def row(self, name: str, model: nn.Module, directory: Path, quantized: str | None) -> dict[str, Any]:
        batch, seed = self.options.batch, self.config.train.seed
        totals = evaluate.measure(self.task, model, Share(0, 1, batch, batch, seed), self.device)
        metrics = self.task.metrics(totals)
        quality = next((key for key in QUALITIES if key in metrics), "eval/loss")
        parameters, nonzeros = count(model)
        times = {f"batch_{size}": self.timer.measure(model, size, self.device) for size in (1, 32)}
        return {
            "recipe": name,
            "directory": str(directory),
            "parameters": parameters,
            "nonzeros": nonzeros,
            "disk_bytes": stored_bytes(directory, quantized),
            "quality_name": quality,
            "quality": metrics[quality],
            "metrics": metrics,
        } | {f"{size}_{key}": value for size, found in times.items() for key, value in found.items()}


def _held(prune: PruneConfig) -> PruneConfig:
    """The smallest magnitudes are the zeros that are there: holding those is the same choice, whatever made it."""
    return replace(prune, method="magnitude", scope="layer" if prune.method == "wanda" else prune.scope)


def count(model: nn.Module) -> tuple[int, int]:
    """Parameters, and those that are not zero; of quantized weights by what they stand for."""
    parameters = nonzeros = 0
    for parameter in model.parameters():
        whole: Any = parameter.detach()
        if type(whole) is not torch.Tensor and hasattr(whole, "dequantize"):
            whole = whole.dequantize()
        parameters += whole.numel()
        nonzeros += int(whole.count_nonzero())
    return parameters, nonzeros


def stored_bytes(directory: Path, quantized: str | None) -> int | None:
    """Of the weights' files: of a quantized model, those of its export beside `directory`, which this writes; None
    where no format takes it."""
    if quantized is not None:
        out = directory.with_name(f"{directory.name}-exported")
        try:
            export_quantized(directory, out, FORMAT_OF[quantized], quantized)
        except ConfigError:
            return None
        return sum(file.stat().st_size for file in out.rglob("*") if file.suffix in (".safetensors", ".bin"))
    checkpoint = newest(directory)
    assert checkpoint is not None
    return sum(file.stat().st_size for file in checkpoint.glob("model*.safetensors"))


# ----------------------------------------------------------------------------------------------------- output

COLUMNS = ("parameters", "non-zero", "MB", "loss", "quality", "ms, batch 1", "batch 32", "mJ, batch 1", "batch 32")
WIDTH = 34


def table(rows: list[dict[str, Any]], head: bool) -> str:
    """A line for each row; `head` names the columns first."""
    lines = []
    if head:
        names = [rows[0]["quality_name"].removeprefix("eval/") if name == "quality" else name for name in COLUMNS]
        lines.append(f"{'recipe':{WIDTH}s}" + "".join(f"{name:>{max(12, len(name) + 2)}s}" for name in names))
    for row in rows:
        names = [row["quality_name"].removeprefix("eval/") if name == "quality" else name for name in COLUMNS]
        widths = [max(12, len(name) + 2) for name in names]
        lines.append(
            f"{row['recipe']:{WIDTH}s}" + "".join(f"{c:>{w}s}" for c, w in zip(cells(row), widths, strict=True))
        )
    return "\n".join(lines)
