"""A trained model under EleutherAI's harness (github.com/EleutherAI/lm-evaluation-harness): its tasks, prompts and
metrics, so that the numbers compare with published ones.

The run is exported as a Hugging Face directory first, and what is measured is that directory as others will load it.
"""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from bigtrain import config as configuration
from bigtrain.checkpoint import newest
from bigtrain.confusion import EVALUATION
from bigtrain.errors import BigtrainError, ConfigError, nearest
from bigtrain.export import CAUSAL, export
from bigtrain.files import write_atomic

RESULTS = "lm_eval.json"


def run(
    run: Path,
    names: list[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    batch: int = 32,
    device: str = "auto",
    out: Path | None = None,
) -> tuple[dict[str, dict[str, Any]], Path]:
    """{task: {metric: value}} of the newest checkpoint of `run`, and the file that they were written to.

    `include`: a directory with tasks of one's own (YAML); `limit`: examples of each task, None: all of them.
    Raises ConfigError for a run whose model does not write on, a task that there is not, or the harness missing,
    BigtrainError for a task whose data cannot be had.
    """
    config = configuration.load(run / "config.yaml")
    if config.task.kind not in CAUSAL:
        raise ConfigError(
            "--lm-eval", ",".join(names), f"RUN's task is {config.task.kind}; the harness asks models that write on",
            "leave it out",
        )  # fmt: skip
    checkpoint = newest(run)
    if checkpoint is None:
        raise ConfigError("RUN", str(run), "holds no complete checkpoint", "train until the first one is saved")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "--lm-eval", ",".join(names), f"needs the harness ({error})", "pip install 'bigtrain[lm-eval]'"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=include)
    for name in names:
        if name not in manager.all_tasks:
            near = nearest(name, manager.all_tasks)
            raise ConfigError(
                "--lm-eval", name, "the harness has no such task",
                f"did you mean {near}?" if near else "lm-eval ls tasks",
            )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bigtrain-") as directory:
        exported = export(run, Path(directory) / "model")
        try:
            found = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(exported), "trust_remote_code": False},
                tasks=names,
                limit=limit,
                batch_size=batch,
                device=_device(device),
                task_manager=manager,
                log_samples=False,
                random_seed=config.train.seed,
            )
        except (OSError, ValueError) as error:  # no network, a data set that is gone, a task of unsafe code
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BigtrainError(f"--lm-eval={','.join(names)}: the harness gave up ({reason})") from error
    results = {task: _plain(metrics) for task, metrics in found["results"].items()}
    path = (out or run / EVALUATION) / RESULTS
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "results": results,
        "examples": {task: count["effective"] for task, count in found["n-samples"].items()},
        "versions": found["versions"] | {"lm_eval": lm_eval.__version__},  # of the tasks, and of the harness
        "checkpoint": checkpoint.name,
    }
    write_atomic(path, json.dumps(facts, indent=1) + "\n")
    return results, path


def _device(device: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    """Its names are "acc,none" and "acc_stderr,none": metric, filter. What is not known of a metric is left out."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and name not in ("alias", "sample_len")
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """A line for each metric of each task, with its standard error."""
    rows = []
    for task, metrics in results.items():
        for name, value in metrics.items():
            if "_stderr" not in name:
                metric, _, filtered = name.partition(",")
                error = metrics.get(f"{metric}_stderr" + (f",{filtered}" if filtered else ""))
                rows.append((task, name, f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{task:{widths[0]}s}  {name:{widths[1]}s}  {value}" for task, name, value in rows)
