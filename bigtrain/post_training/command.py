"""`bigtrain compress`: what each recipe does to a trained model, in parameters, bytes, quality, time and energy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain import config as schema
from bigtrain import evaluate, tasks
from bigtrain.checkpoint import inference, newest
from bigtrain.checkpoint.weights import iterate_weights
from bigtrain.compress import quantize
from bigtrain.compress.layers import choose
from bigtrain.compress_config import CompressConfig, DistilConfig, PruneConfig, QuantizeConfig, n_of_m
from bigtrain.config import Config, ModelConfig
from bigtrain.data.example_loader import Share
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.files import write_atomic
from bigtrain.launch import Stopped
from bigtrain.launch import train as launch
from bigtrain.models.stored import INDEX, Quantized, StoredTensors
from bigtrain.post_training import model_directory, oneshot, recipe, structure
from bigtrain.post_training.page import QUALITY, REMOVED, SIZE_COLUMNS, TIME_COLUMNS, quality_of, write_page
from bigtrain.post_training.recipe import Recipe
from bigtrain.post_training.timer import Timer
from bigtrain.worker import LABELS

DENSE = "dense"
# The first of these that a task has is its quality; larger is better of all but the last.
QUALITIES = ("eval/accuracy", "eval/f1", "eval/spearman", "eval/bleu", "eval/masked_accuracy", "eval/perplexity")
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

    Writes out/<recipe>/, each a directory that other commands take for a run, compress.json, pictures and index.html.
    What is said of a model's size and quality is of what lies in its directory, read again. Returns what is in
    compress.json. Raises ConfigError for a recipe or data that cannot be used, before anything is
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
    bench = Bench(source, config, out, {one.folder for one in wanted}, options, say)
    for one in wanted:
        bench.check(one)
    out.mkdir(parents=True, exist_ok=True)
    rows = [bench.row(DENSE, "nothing", source)]
    say(table(SIZE_COLUMNS, rows))
    for one in wanted:
        rows.append(bench.apply(one))
        say(table(SIZE_COLUMNS, rows[-1:], head=False))
    bench.time(rows)
    say("\n" + table(TIME_COLUMNS, rows))
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

    def __init__(
        self, source: Path, config: Config, out: Path, kept: set[str], options: Options, say: Callable[[str], None]
    ) -> None:
        """kept: the folders in `out` that recipes are for."""
        self.source, self.config, self.out, self.kept, self.options, self.say = source, config, out, kept, options, say
        self.task: Any = tasks.build(config)
        self.timer = Timer(self.task, options.watts, options.compile)
        checkpoint = newest(source)
        assert checkpoint is not None
        self.checkpoint = checkpoint
        # What is written has the type of what it is made of, or bytes could not be compared; inference is in another.
        stored = StoredTensors(checkpoint)
        self.dtype = stored.tensor(stored.names[0]).dtype

    def check(self, wanted: Recipe) -> None:
        """Raises ConfigError for what this model does not have, or its layers' shapes do not allow."""
        config = self.config.model
        if wanted.cut != structure.Cut():
            config = structure.smaller(config, wanted.cut)
        with torch.device("meta"):
            model = self.task.build_model(config)
        if wanted.prune is not None:
            oneshot.check(model, wanted.prune)
        if wanted.quantize is not None:
            scheme, settings = quantize.PTQ[wanted.quantize], quantized_as(wanted.quantize)
            for layer in choose(model, settings.include, settings.exclude, "RECIPE"):
                if scheme.group_size and layer.shape[1] % scheme.group_size:
                    problem = (
                        f"{layer.module} has {layer.shape[1]} inputs, and {scheme.group_size} of them share a scale"
                    )
                    raise ConfigError("RECIPE", wanted.name, problem, "take int8, or cut to a multiple of that")
            quantize.prepare(model, scheme, settings.include, settings.exclude, "RECIPE")

    def removed(self, wanted: Recipe) -> str:
        """What a recipe takes away, in words."""
        said = []
        if wanted.cut != structure.Cut():
            for part, there in structure.parts(self.config.model).items():
                if asked := getattr(wanted.cut, part):
                    said.append(f"{structure.amount(part, asked, there)} of {there} {part}")
        if wanted.prune is not None:
            pattern = n_of_m(wanted.prune.pattern)
            share = 1 - pattern[0] / pattern[1] if pattern else wanted.prune.sparsity
            said.append(f"{share:.0%} of weights (to 0)")
        return ", ".join(said) or "nothing"

    def apply(self, wanted: Recipe) -> dict[str, Any]:
        """One recipe from beginning to end; its row of the table."""
        directory = self._dense(wanted)
        if wanted.quantize is not None:
            dense, directory = directory, self._quantized(directory, wanted.quantize)
            if dense.name == wanted.dense not in self.kept:  # a step on the way that nobody asked for
                shutil.rmtree(dense)
        return self.row(wanted.name, self.removed(wanted), directory)

    # ------------------------------------------------------------------------------------------------- steps

    def _dense(self, wanted: Recipe) -> Path:
        """The directory of what is there before quantization: made once, for all recipes that begin so."""
        if not wanted.dense:
            return self.source
        directory = self.out / wanted.dense
        recovered = directory.with_name(f"{directory.name}-recovered")
        if not directory.is_dir():
            if wanted.cut != structure.Cut():
                self._cut(wanted.cut, directory)
            if wanted.prune is not None:
                self._prune(wanted.prune, directory if directory.is_dir() else self.source, directory)
        if not self.options.recover_steps:
            return directory
        return recovered if recovered.is_dir() else self._recovered(wanted, directory, recovered)

    def _cut(self, cut: structure.Cut, out: Path) -> None:
        model = self.load(self.source)
        batches = self.batches() if self.options.by != "magnitude" else []
        found = structure.importances(model, self.options.by, batches, self.task.loss)
        kept = structure.choose(self.config.model, cut, found)
        smaller, tensors = structure.shrink(self.config.model, kept, self._named(model))
        self._write(out, smaller, tensors)

    def _prune(self, settings: PruneConfig, directory: Path, out: Path) -> None:
        model = self.load(directory)
        oneshot.prune(model, settings, self.batches() if settings.method == "wanda" else (), self.task.loss)
        self._write(out, schema.load(directory / "config.yaml").model, self._named(model))

    def _quantized(self, directory: Path, name: str) -> Path:
        """Its linear layers as integers, beside it; what quantization is to leave out it leaves out."""
        config, checkpoint, settings = schema.load(directory / "config.yaml"), newest(directory), quantized_as(name)
        assert checkpoint is not None
        with torch.device("meta"):
            model = self.task.build_model(config.model)
        tensors = quantize.quantized_weights(model, iterate_weights(checkpoint), settings, "RECIPE")
        out = self.out / (name if directory == self.source else f"{directory.name}+{name}")
        self._write(out, config.model, tensors, settings)
        return out

    def _write(
        self, out: Path, model: ModelConfig, tensors: Iterable[tuple[str, Tensor | Quantized]],
        quantized: QuantizeConfig | None = None,
    ) -> None:  # fmt: skip
        tokenizer = self.source / "tokenizer"
        model_directory.write(out, self.config, model, tensors, tokenizer, self.labels(), quantized)

    def _named(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return ((name, parameter.detach().to(self.dtype)) for name, parameter in model.named_parameters())

    def _recovered(self, wanted: Recipe, directory: Path, run_dir: Path) -> Path:
        """Train on, as the run was, from what the recipe has left, and with its zeros held."""
        steps, config = self.options.recover_steps, schema.load(directory / "config.yaml")
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
        return run_dir

    # ----------------------------------------------------------------------------------------------- measuring

    def load(self, directory: Path) -> nn.Module:
        """The model that lies there, ready to be asked; of integers as `quantize.convert` leaves it."""
        config, checkpoint = schema.load(directory / "config.yaml"), newest(directory)
        assert checkpoint is not None
        model, self.device = inference.load(
            lambda: quantize.as_trained(self.task.build_model(config.model), config, checkpoint), checkpoint, "auto"
        )
        return quantize.convert(model)

    def batches(self) -> list[Any]:
        """Calibration batches, of the training data."""
        share = Share(0, 1, CALIBRATION, CALIBRATION, self.config.train.seed)
        loader = self.task.train_loader(share)
        found = [batch for step in range(self.options.calibration_batches) for batch in loader.batches(step)]
        return [{name: tensor.to(self.device) for name, tensor in batch.items()} for batch in found]

    def labels(self) -> Any:
        path = self.source / LABELS
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def row(self, name: str, removed: str, directory: Path) -> dict[str, Any]:
        batch, seed = self.options.batch, self.config.train.seed
        totals = evaluate.measure(self.task, self.load(directory), Share(0, 1, batch, batch, seed), self.device)
        metrics = self.task.metrics(totals)
        quality = next((key for key in QUALITIES if key in metrics), "eval/loss")
        checkpoint = newest(directory)
        assert checkpoint is not None
        return {
            "recipe": name,
            "removed": removed,
            "directory": str(directory),
            **on_disk(checkpoint),
            "quality_name": quality,
            "quality": metrics[quality],
            "metrics": metrics,
        }

    def time(self, rows: list[dict[str, Any]]) -> None:
        """Add to each row how long its model takes and what energy. All are held in memory for that if they fit."""
        bytes_of_all = 4 * sum(row["parameters"] for row in rows)
        hold = bytes_of_all < inference.free_memory(self.device) / 2
        loads = [partial(self.load, Path(row["directory"])) for row in rows]
        for row, times in zip(rows, self.timer.compare(loads, self.device, hold), strict=True):
            row.update(times)


def quantized_as(name: str) -> QuantizeConfig:
    """A name of quantize.PTQ as a section of the config: from the first step on, with the scales that it has."""
    scheme = quantize.PTQ[name]
    return QuantizeConfig(scheme.bits, scheme.group_size, scheme.activations, start=0, freeze=0)


def _held(prune: PruneConfig) -> PruneConfig:
    """The smallest magnitudes are the zeros that are there: holding those is the same choice, whatever made it."""
    return replace(prune, method="magnitude", scope="layer" if prune.method == "wanda" else prune.scope)


def on_disk(checkpoint: Path) -> dict[str, Any]:
    """Of the weights as they lie there: parameters, those that are not zero, bytes, and bits for each parameter."""
    parameters = nonzeros = 0
    for _, tensor in iterate_weights(checkpoint):
        parameters += tensor.numel()
        nonzeros += int(tensor.count_nonzero())
    size = sum(file.stat().st_size for file in checkpoint.glob("model*.safetensors*") if file.name != INDEX)
    return {"parameters": parameters, "nonzeros": nonzeros, "disk_bytes": size, "bits": 8 * size / parameters}


# ----------------------------------------------------------------------------------------------------- output

WIDTH = 34  # of a recipe


def table(columns: dict[str, Callable[[dict[str, Any]], str]], rows: list[dict[str, Any]], head: bool = True) -> str:
    """A line for each row; `head` names the columns first."""
    names = [quality_of(rows[0]) if name == QUALITY else name for name in columns]
    lines = [names] if head else []
    lines += [[write(row) for write in columns.values()] for row in rows]
    widths = [max(12, *(len(line[index]) + 2 for line in [names, *lines])) for index in range(len(names))]
    if REMOVED in columns:
        widths[-1] = 0  # it ends the line
    recipes = ["recipe"] * head + [row["recipe"] for row in rows]
    return "\n".join(
        f"{recipe:{WIDTH}s}"
        + "".join(f"{cell:>{width}s}" if width else f"  {cell}" for cell, width in zip(line, widths, strict=True))
        for recipe, line in zip(recipes, lines, strict=True)
    )
