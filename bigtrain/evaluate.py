"""Measure a trained model on its own held-out data or on other data: a table, a JSON file, the predictions."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigtrain import config as configuration
from bigtrain import confusion, tasks
from bigtrain.checkpoint import inference, newest
from bigtrain.compress.quantize import as_trained
from bigtrain.config import LABELLED_TASKS, Config, LabelledDataConfig, TextDataConfig, TokenizerConfig
from bigtrain.confusion import CONFUSION, EVALUATION, METRICS
from bigtrain.data.encode_examples import record_kind
from bigtrain.data.example_loader import Share
from bigtrain.data.left_out import say_and_record
from bigtrain.data.prepare import prepare_held_out
from bigtrain.data.prepare_examples import say, write_examples
from bigtrain.data.records import open_held_out
from bigtrain.data.tokenizer import find_tokenizer
from bigtrain.errors import ConfigError
from bigtrain.export import labels as labels_of
from bigtrain.files import write_atomic
from bigtrain.progress import counted
from bigtrain.tasks import Task, Totals
from bigtrain.tasks.labelled import LabelledTask

RESAMPLES = 1000  # of the examples, for the confidence intervals
CONFIDENCE = 0.95
SAID = ("data/notes", "data/left_out")  # on the terminal too


def run(
    run: Path,
    *,
    data: list[str],
    columns: dict[str, str | int],
    batch: int = 32,
    device: str = "auto",
    max_memory: dict[str, str] | None = None,
    out: Path | None = None,
) -> tuple[dict[str, Any], Path]:
    """Metrics of the newest checkpoint of `run`, and the directory with metrics.json and predictions.jsonl.

    `data` names labelled files of the run's task, text for one that learns from text, or a hub dataset, whose held-out
    split is read; empty: the held-out part of what the run was trained on. Columns are those of the run's own files,
    but for what `columns` names. Metrics of tasks on examples have a bootstrap confidence interval (Efron 1979),
    `<name>_low` and `<name>_high`; a classifier or tagger also has a table by label, and confusion.png.
    `bigtrain report` shows what lies in RUN/evaluation.
    device and max_memory: as `inference.load` has them.
    Raises ConfigError for what is no run, has no checkpoint, or data that do not fit the run's task or labels.
    """
    config = configuration.load(run / "config.yaml")
    checkpoint = newest(run)
    if checkpoint is None:
        raise ConfigError("RUN", str(run), "holds no complete checkpoint", "train until the first one is saved")
    with _data(run, config, data, columns) as used:
        task = tasks.build(used)
        model, where = inference.load(
            lambda: as_trained(task.build_model(used.model), config, checkpoint), checkpoint, device, max_memory
        )
        totals = measure(task, model, Share(0, 1, batch, batch, config.train.seed), where, shown=True)
        metrics: dict[str, Any] = task.metrics(totals)
        out = out or run / EVALUATION
        out.mkdir(parents=True, exist_ok=True)
        if isinstance(task, LabelledTask):
            metrics |= intervals(task, totals, config.train.seed)
            write_atomic(out / "predictions.jsonl", "".join(_predictions(task, totals)))
            if (labels := task.predicted_and_true(totals)) is not None:
                counts = confusion.matrix(*labels, len(task.labels))
                metrics["labels"] = task.by_label(totals) or confusion.by_label(counts, task.labels)
                (out / CONFUSION).write_bytes(confusion.picture(counts, task.labels))
    metrics |= {"checkpoint": checkpoint.name, "data": data or "held-out"}
    # A language model is judged by the token, whatever texts those are of.
    metrics |= {"examples": len(totals.predictions)} if totals.predictions else {"tokens": totals.targets}
    # What was cut or left out of the data is part of what the numbers are of.
    metrics |= {name: value for name, value in task.facts().items() if name in ("data/examples_cut", *SAID)}
    write_atomic(out / METRICS, json.dumps(metrics, indent=1) + "\n")
    return metrics, out


@contextmanager
def _data(run: Path, config: Config, data: list[str], columns: dict[str, str | int]) -> Iterator[Config]:
    """The run's config with the data to measure on in data.prepared_dir."""
    if not data:
        yield config
        return
    if not isinstance(config.task, LABELLED_TASKS):
        with tempfile.TemporaryDirectory(prefix="bigtrain-") as directory:
            yield _text(run, config, data, Path(directory))
        return
    labels = labels_of(run, config) or []
    trained = config.data if isinstance(config.data, LabelledDataConfig) else LabelledDataConfig()
    described = LabelledDataConfig(
        path=data, columns=trained.columns | columns, header=trained.header, name=trained.name
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bigtrain-") as directory:
        records = open_held_out(described, record_kind(config.task), labels, Path(directory), "--data")
        used = replace(config, data=replace(described, prepared_dir=directory))
        tokenizer = find_tokenizer(str(run / "tokenizer"), "RUN")
        notes = write_examples(Path(directory), used, tokenizer, labels, records)
        say(notes, file=sys.stderr)
        say_and_record(records.left_out, Path(directory), sys.stderr)
        yield used


def _text(run: Path, config: Config, data: list[str], directory: Path) -> Config:
    trained = config.data if isinstance(config.data, TextDataConfig) else TextDataConfig()
    tokenizer = TokenizerConfig(path=str(run / "tokenizer"))
    text = replace(trained, path=data, held_out_path=None, tokenizer=tokenizer, prepared_dir=None)
    prepared = prepare_held_out(replace(config, data=text), directory, "--data")
    return replace(config, data=replace(text, prepared_dir=str(prepared.directory)))


@torch.inference_mode()
def measure(
    task: Task, model: torch.nn.Module, share: Share, device: torch.device, shown: bool = False
) -> Totals:  # fmt: skip
    """Run the model over the task's held-out batches. shown: say on standard error how far it is."""
    nll, targets = 0.0, 0
    sums: dict[str, float] = {}
    predictions: dict[int, Any] = {}
    batches = task.held_out(share)
    for cpu_batch in counted(batches, len(batches), "evaluating, batches") if shown else batches:
        targets += task.count_targets(cpu_batch)
        found = task.evaluate(model, {name: tensor.to(device) for name, tensor in cpu_batch.items()})
        nll += float(found.nll)
        predictions |= dict(found.predictions)
        for name, value in found.sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return Totals(nll, targets, sums, task.joined(predictions))


def intervals(task: LabelledTask, totals: Totals, seed: int) -> dict[str, float]:
    """Percentile bootstrap over the examples: what another sample of the same size would have given."""
    random, n = np.random.default_rng(seed), len(totals.predictions)
    resampled = task.resampled(totals)
    drawn: dict[str, list[float]] = {}
    for _ in counted(range(RESAMPLES), RESAMPLES, "confidence intervals, samples"):
        for name, value in resampled(random.integers(n, size=n)).items():
            drawn.setdefault(name, []).append(value)
    tail = 100 * (1 - CONFIDENCE) / 2
    found: dict[str, float] = {}
    for name, values in drawn.items():
        # Where the loss is that of the whole set, and not of the examples drawn, it never changes.
        if name not in ("eval/loss", "eval/perplexity") or len(set(values)) > 1:
            low, high = np.percentile(values, [tail, 100 - tail])
            found |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def _predictions(task: LabelledTask, totals: Totals) -> Iterator[str]:
    for index, record in enumerate(task.data.held_out_records()):
        if index in totals.predictions:
            row = record | task.prediction(totals.predictions[index])
            yield json.dumps(row, ensure_ascii=False) + "\n"


def table(metrics: dict[str, Any]) -> str:
    """The metrics, a line each, with their intervals."""
    names = [name for name in metrics if name.startswith("eval/") and not name.endswith(("_low", "_high"))]
    if "eval/no_answer_accuracy" not in metrics:  # every question has an answer: there is nothing to compare
        names = [name for name in names if name != "eval/none_exact_match"]
    width = max(len(name) for name in names)
    lines = []
    for name in names:
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        interval = f"  [{low:.4f}, {high:.4f}]" if low is not None and high is not None else ""
        lines.append(f"{name:{width}s}  {metrics[name]:.4f}{interval}")
    if "labels" in metrics:
        lines += ["", confusion.table(metrics["labels"])]
    return "\n".join(lines)
