"""The training loop."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from bigtrain import heartbeat
from bigtrain.batch import Batch, count_tokens
from bigtrain.checkpoint import Checkpoint
from bigtrain.checkpoint import store as checkpoint_store
from bigtrain.config import Config
from bigtrain.data.example_loader import Share
from bigtrain.engine.base import Engine, StepOutcome
from bigtrain.engine.host import HostGroup
from bigtrain.errors import BigtrainError
from bigtrain.hooks import Hooks, RunInfo
from bigtrain.schedule import lr_multiplier
from bigtrain.tasks import Evaluated, Task, Totals, TrainLoader


class Trainer:
    """Runs the steps that are left, on every rank alike.

    The order of one step: agree on tokens and on stopping, forward and backward per micro-batch, update, then on
    their own cadences log (the only wait for the device), evaluate, save.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        engine: Engine,
        host: HostGroup,
        task: Task,
        share: Share,
        hooks: Hooks,
        info: RunInfo,
        stop: Event,
    ) -> None:
        self.config, self.run_dir, self.info = config, run_dir, info
        self.engine, self.host, self.task, self.hooks = engine, host, task, hooks
        self.train_data: TrainLoader = task.train_loader(share)
        self.held_out = task.held_out(share)
        self.held_out_sample = task.held_out(share, config.train.eval_batches)
        self.stop = stop  # set by a signal on any rank
        self.step = 0  # optimizer steps done
        self.tokens = 0  # trained on so far, over all ranks, padding not counted
        self.saved_step = -1
        self.train_seconds = 0.0  # over all sessions of the run
        self.last_metrics: dict[str, float] = {}
        self.throughput: list[float] = []

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where `checkpoint` was saved."""
        checkpoint_store.load(checkpoint, self.engine)
        self.step = self.saved_step = checkpoint.step
        self.tokens = checkpoint.manifest["tokens"]
        self.train_seconds = checkpoint.manifest["train_seconds"]
        self.hooks.load_state(checkpoint.manifest["hooks"])

    def fit(self) -> dict[str, Any]:
        """Train to `train.steps`, or until a stop is asked for; save; evaluate if the run is finished.

        Returns what result.json holds of it. Raises BigtrainError if the loss or a gradient stops being finite.
        """
        train = self.config.train
        self.session_started = time.perf_counter() - self.train_seconds
        self.hooks.on_start(self.info)
        self.engine.model.train()
        window = _Window(self.engine.device)
        with ThreadPoolExecutor(1, "loader") as loader:
            upcoming = loader.submit(self.train_data.batches, self.step)
            doing = heartbeat.FIRST_STEP
            while self.step < train.steps:
                if doing == heartbeat.STEP and not upcoming.done():
                    heartbeat.phase(heartbeat.LOADING_DATA)
                    wait([upcoming])
                heartbeat.phase(doing, self.step)
                micro_batches, upcoming = upcoming.result(), self._prefetch(loader)
                targets, tokens, stops = self.host.sum(
                    sum(map(self.task.count_targets, micro_batches)),
                    sum(map(count_tokens, micro_batches)),
                    self.stop.is_set(),
                )
                if stops:
                    break
                multiplier = lr_multiplier(self.config.schedule, self.step, train.steps)
                outcome = self._update(micro_batches, targets, multiplier, window)
                self.step += 1
                doing = heartbeat.STEP
                self.tokens += int(tokens)
                window.tokens += tokens
                evaluates = self._due(train.eval_every) and self.step < train.steps
                saves = self._due(train.save_every)
                if self._due(self.config.logger.log_every) or evaluates or saves or self.step == train.steps:
                    self._log(window, outcome, multiplier)
                if evaluates:
                    self.hooks.on_evaluate(self.step, self.evaluate(self.held_out_sample))
                if saves:
                    self._save()
                if evaluates or saves:
                    window.clear()  # their time is not training time
        self.train_seconds = self._seconds()
        self._save()
        result: dict[str, Any] = {"status": "finished" if self.step >= train.steps else "stopped"}
        if self.step >= train.steps:
            metrics = self.evaluate(self.held_out)
            self.hooks.on_evaluate(self.step, metrics)
            result |= metrics
        return result | self._summary()

    def _seconds(self) -> float:
        return time.perf_counter() - self.session_started

    def _prefetch(self, loader: ThreadPoolExecutor) -> Future[list[Batch]]:
        """The next step's micro-batches are read while this step computes."""
        return loader.submit(self.train_data.batches, self.step + 1)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _update(self, micro_batches: list[Batch], targets: float, multiplier: float, window: _Window) -> StepOutcome:
        """One optimizer step: gradients of the loss per token, over the tokens of all ranks."""
        for index, batch in enumerate(micro_batches):
            heartbeat.beat()
            on_device = {name: tensor.to(self.engine.device, non_blocking=True) for name, tensor in batch.items()}
            last = index == len(micro_batches) - 1
            sums = self.engine.forward_backward(self.task.loss, on_device, 1 / targets, last)
            window.nll += sums.nll
        window.targets += targets
        window.steps += 1
        return self.engine.step(multiplier)

    def _log(self, window: _Window, outcome: StepOutcome, multiplier: float) -> None:
        """Metrics of the steps since the last log. Reading the loss waits for the device."""
        (nll,) = self.host.sum(float(window.nll))
        seconds = window.elapsed()
        tokens_per_second = window.tokens / seconds
        metrics = {
            "train/loss": nll / window.targets,
            "train/lr": self.config.optimizer.lr * multiplier,
            "perf/tokens_per_second": tokens_per_second,
            "perf/step_seconds": seconds / window.steps,
            "perf/peak_memory_gib": peak_memory_gib(self.engine.device),
            "data/tokens": float(self.tokens),
        }
        if outcome.grad_norm is not None:
            metrics["train/grad_norm"] = float(outcome.grad_norm)
        if self.info.peak_flops:
            metrics["perf/mfu"] = self.info.flops_per_token * tokens_per_second / self.info.peak_flops
        self._check_finite(metrics, outcome)
        self.throughput.append(tokens_per_second)
        self.last_metrics = metrics
        if self.host.rank == 0:
            self.hooks.on_step(self.step, metrics)
        window.clear()

    def _check_finite(self, metrics: dict[str, float], outcome: StepOutcome) -> None:
        for name in ("train/loss", "train/grad_norm"):
            value = metrics.get(name, 0.0)
            scaling_back = name == "train/grad_norm" and self.config.train.precision == "fp16" and not outcome.applied
            if not math.isfinite(value) and not scaling_back:
                raise BigtrainError(
                    f"{name} is {value} at step {self.step}: the run cannot go on; lower optimizer.lr"
                    f" (now {self.config.optimizer.lr}), lengthen schedule.warmup_steps or set train.grad_clip,"
                    " and continue from the last checkpoint or in a new run_dir"
                )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The task's metrics over `batches`, which every rank has equally many of."""
        heartbeat.phase(heartbeat.EVALUATING, self.step)
        self.engine.model.eval()
        found: list[Evaluated] = []
        targets = 0
        for batch in batches:
            heartbeat.beat()
            targets += self.task.count_targets(batch)
            on_device = {name: tensor.to(self.engine.device, non_blocking=True) for name, tensor in batch.items()}
            found.append(self.engine.evaluate(self.task.evaluate, on_device))
        self.engine.model.train()
        return self.task.metrics(self._totals(found, targets))

    def _totals(self, found: list[Evaluated], targets: int) -> Totals:
        """Of all ranks, on every rank."""
        names = list(found[0].sums) if found else []
        nll = sum(float(part.nll) for part in found)
        sums = [sum(float(part.sums[name]) for part in found) for name in names]
        total_nll, total_targets, *total_sums = self.host.sum(nll, targets, *sums)
        mine = [row for part in found for row in part.predictions]
        predictions = self.task.joined(dict(row for rows in self.host.gather(mine) for row in rows))
        return Totals(total_nll, int(total_targets), dict(zip(names, total_sums, strict=True)), predictions)

    def _save(self) -> None:
        if self.step == self.saved_step:
            return
        heartbeat.phase(heartbeat.SAVING, self.step)
        states = self.hooks.state() if self.host.rank == 0 else {}
        state = {
            "tokens": self.tokens,
            "train_seconds": self._seconds(),
            "engine": self.config.engine.kind,
            "hooks": states,
        }
        path = checkpoint_store.save(
            self.run_dir, self.step, self.engine, self.host, state, self.config.train.keep_checkpoints
        )
        self.saved_step = self.step
        self.hooks.on_checkpoint(self.step, path)

    def _summary(self) -> dict[str, Any]:
        ordered = sorted(self.throughput)
        return {
            "train/loss": self.last_metrics.get("train/loss"),
            "train/steps": self.step,
            "data/tokens": self.tokens,
            "time/train_seconds": self.train_seconds,
            "perf/tokens_per_second": ordered[len(ordered) // 2] if ordered else None,
            "perf/peak_memory_gib": peak_memory_gib(self.engine.device),
        }


class _Window:
    """What has accumulated since the last log; sums stay on the device until then."""

    nll: Tensor
    targets: float
    tokens: float
    steps: int

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clear()

    def clear(self) -> None:
        self.nll = torch.zeros((), dtype=torch.float64, device=self.device)
        self.targets, self.tokens, self.steps = 0.0, 0.0, 0
        self.started = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.started


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this rank has held: on a GPU what torch allocated there, on a CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
