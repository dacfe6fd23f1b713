"""The training loop."""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from bigtrain import guards, heartbeat, held_out
from bigtrain.batch import Batch, count_tokens
from bigtrain.checkpoint import Checkpoint, Keep, changes, facts
from bigtrain.checkpoint import store as checkpoint_store
from bigtrain.config import Config
from bigtrain.data.example_loader import Share
from bigtrain.engine.base import Engine, LossFunction, StepOutcome
from bigtrain.engine.host import HostGroup
from bigtrain.engine.unpickling import refusals
from bigtrain.errors import BigtrainError
from bigtrain.hooks import Hooks, RunInfo
from bigtrain.privacy import Privacy
from bigtrain.profile import Profiler
from bigtrain.schedule import lr_multiplier
from bigtrain.stragglers import ForwardTimer, Stragglers
from bigtrain.tasks import Evaluated, Task, Totals, TrainLoader
from bigtrain.transform import Transform

# Of a forward over the whole held-out set, at least: without gradients there is room, and small ones take their time.
EVAL_TOKENS = 4096


class Trainer:
    """Runs the steps that are left, on every rank alike.

    The order of one step: agree on tokens and on stopping, forward and backward per micro-batch, let the guard judge,
    update, then on their own cadences log (the only wait for the device), evaluate, save.
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
        transforms: Sequence[Transform] = (),
        privacy: Privacy | None = None,
    ) -> None:
        self.config, self.run_dir, self.info = config, run_dir, info
        self.engine, self.host, self.task, self.hooks = engine, host, task, hooks
        self.transforms, self.privacy = transforms, privacy
        self.loss: LossFunction = task.loss
        for transform in transforms:
            self.loss = transform.loss(self.loss)
        self.train_data: TrainLoader = task.train_loader(share)
        at_once = max(share.micro_batch, EVAL_TOKENS // config.model.max_seq_len)
        self.held_out = task.held_out(replace(share, micro_batch=at_once))
        sample = task.held_out(share, config.train.eval_batches)
        self.held_out_sample = self.held_out if sample.whole else sample
        self.guard = guards.Guard(config.train.guard)
        self.stop = stop  # set by a signal on any rank
        self.step = 0  # optimizer steps done
        self.share = share
        self.tokens = 0  # trained on so far, over all ranks, padding not counted
        self.saved_step = -1
        train = config.train
        keep = Keep(train.keep_checkpoints, train.keep_every, train.keep_best)
        self.saver = checkpoint_store.Saver(run_dir, engine, host, keep, train.async_save, train.encryption, transforms)
        self.save_stall_seconds, self.failed_saves = 0.0, 0  # of this session
        self.train_seconds = 0.0  # over all sessions of the run
        self.last_metrics: dict[str, float] = {}
        self.throughput: list[float] = []
        self.step_seconds: list[float] = []
        self.forward = ForwardTimer(engine.device)
        self.stragglers = Stragglers(info.hosts)
        self.profiler = Profiler(train.profile, run_dir, host.rank, engine.model)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where `checkpoint` was saved."""
        with refusals(checkpoint.path):
            checkpoint_store.load(checkpoint, self.engine, self.transforms)
        manifest, batch = checkpoint.manifest, self.config.train.global_batch
        self.step = self.saved_step = checkpoint.step
        self.tokens = manifest["tokens"]
        self.guard.load_state(manifest.get("guard", {}))
        if manifest.get("global_batch", batch) != batch:
            self.guard.left_out = []  # counted in steps of the old batch, all but a last one passed
        shift = manifest.get("sequences", self.sequences()) - self.guard.data_step(self.step) * batch
        if shift != self.share.shift:  # the global batch has changed: go on in the data where it stands
            self.share = replace(self.share, shift=shift)
            self.train_data = self.task.train_loader(self.share)
        self.train_seconds = manifest["train_seconds"]
        self.hooks.load_state(manifest["hooks"])

    def sequences(self) -> int:
        """How far the run is in the order of the data, over all ranks; what a guard left out is counted too."""
        return self.guard.data_step(self.step) * self.config.train.global_batch + self.share.shift

    def fit(self) -> dict[str, Any]:
        """Train to `train.steps`, or until a stop is asked for; save; evaluate if the run is finished.

        Returns what result.json holds of it. Raises BigtrainError if the loss or a gradient stops being finite.
        """
        train = self.config.train
        self.session_started = time.perf_counter() - self.train_seconds
        self.hooks.on_start(self.info)
        self._begin()
        window = _Window(self.engine.device)
        with ThreadPoolExecutor(1, "loader") as loader:
            upcoming = self._prefetch(loader, self.step)
            doing = heartbeat.FIRST_STEP
            while self.step < train.steps:
                if doing == heartbeat.STEP and not upcoming.done():
                    heartbeat.phase(heartbeat.LOADING_DATA)
                    wait([upcoming])
                heartbeat.phase(doing, self.step)
                micro_batches, upcoming = upcoming.result(), self._prefetch(loader, self.step + 1)
                targets, tokens, stops, written = self.host.sum(
                    sum(map(self.task.count_targets, micro_batches)),
                    sum(map(count_tokens, micro_batches)),
                    self.stop.is_set() or (train.stop_at is not None and self.step >= train.stop_at),
                    self.saver.written(),
                )
                if self.saver.pending and written == self.host.world_size:
                    began = time.perf_counter()
                    self._publish()
                    window.started += time.perf_counter() - began  # not training time
                if stops:
                    break
                self.profiler.before(self.step)
                multiplier = lr_multiplier(self.config.schedule, self.step, train.steps)
                outcome, problem = self._guarded_update(micro_batches, targets, multiplier, window)
                if problem and train.guard.spike == "rollback" and self._roll_back(problem):
                    upcoming = self._prefetch(loader, self.step)
                    window.clear()
                    continue
                self.step += 1
                for transform in self.transforms:
                    transform.update(self.step)
                doing = heartbeat.STEP
                self.tokens += int(tokens)
                window.tokens += tokens
                saves = self._due(train.save_every)
                evaluates = (self._due(train.eval_every) and self.step < train.steps) or (saves and train.keep_best)
                seen: dict[str, float] = {}
                if self._logs(self.step):
                    self._log(window, outcome, multiplier)
                if problem:
                    self.hooks.on_warning(self.step, problem)
                if evaluates:
                    seen = self.evaluate_meanwhile()
                    self.hooks.on_evaluate(self.step, seen)
                if saves:
                    self._save(seen)
                if evaluates or saves:
                    window.clear()  # their time is not training time
        self.profiler.close(self.step)
        self.train_seconds = self._seconds()
        self._save_last()
        result: dict[str, Any] = {"status": "stopped"}
        if self.step >= train.steps:
            with contextlib.suppress(_Stopped):  # then only this is left to do, by the next session
                metrics = self.evaluate(self._until_stopped(self.held_out))
                self.hooks.on_evaluate(self.step, metrics)
                result = {"status": "finished"} | metrics
        return result | self._summary()

    def _begin(self) -> None:
        self.engine.model.train()
        for transform in self.transforms:
            transform.begin(self.step)

    def _seconds(self) -> float:
        return time.perf_counter() - self.session_started

    def _prefetch(self, loader: ThreadPoolExecutor, step: int) -> Future[list[Batch]]:
        """A step's micro-batches are read while the step before computes."""
        return loader.submit(self.train_data.batches, self.guard.data_step(step))

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _logs(self, step: int) -> bool:
        """Whether the loss of the steps up to `step` is written down then."""
        train = self.config.train
        cadences = (self.config.logger.log_every, train.eval_every, train.save_every)
        return step == train.steps or any(every and step % every == 0 for every in cadences)

    def _guarded_update(
        self, micro_batches: list[Batch], targets: float, multiplier: float, window: _Window
    ) -> tuple[StepOutcome, str | None]:
        """One optimizer step, or none if the guard finds something wrong: then also what.

        Raises BigtrainError where the run cannot go on from it.
        """
        engine, policy = self.engine, self.guard.config.spike
        if self.privacy is not None:
            self.privacy.step = self.step
        scale = 1 / max(targets, 1)  # a private step may have drawn no example: then it is all noise
        data_step, random = self.guard.data_step(self.step), guards.RandomState.now(engine.device)
        step = guards.Step(self.step, micro_batches, lambda: self.train_data.samples(data_step), scale, random)
        if self.guard.replays(self.step):
            guards.check_replay(step, engine, self.loss, self.host)
        nll = self._forward_backward(step)
        window.steps += 1
        if policy != "off" or self._logs(self.step + 1):
            past, now = self.host.sum(float(window.nll), float(nll))
            loss = now / max(targets, 1)
            if not math.isfinite(loss):
                engine.discard()
                return StepOutcome(None, False), self._not_finite("train/loss", loss, step)
            window.nll_of_all = past + now
            spike = self.guard.spike(loss)
            if spike and policy != "warn":
                engine.discard()
                self.guard.count(spike, self.step + 1)
        else:
            spike = None
        window.nll += nll
        window.targets += targets
        if spike and policy != "warn":
            return StepOutcome(None, False), spike
        outcome = engine.step(multiplier)
        if not outcome.applied:
            norm = float(outcome.grad_norm if outcome.grad_norm is not None else math.nan)
            return outcome, self._not_finite("train/grad_norm", norm, step)
        return outcome, spike

    def _forward_backward(self, step: guards.Step) -> Tensor:
        """Gradients of the loss per token, over the tokens of all ranks. This rank's loss, summed, on the device."""
        nll = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        loss = self.forward.timed(self.loss)
        for index, batch in enumerate(step.micro_batches):
            heartbeat.beat()
            on_device = {name: tensor.to(self.engine.device, non_blocking=True) for name, tensor in batch.items()}
            last = index == len(step.micro_batches) - 1
            nll += self.engine.forward_backward(loss, on_device, step.scale, last).nll
        return nll

    def _not_finite(self, name: str, value: float, step: guards.Step) -> str | None:
        """What is wrong and where, if the run can go on without this update (which nobody made). None: nothing is."""
        train, number = self.config.train, step.number + 1
        where = guards.diagnose(step, self.engine, self.loss, self.host)
        if not where and name == "train/grad_norm" and train.precision == "fp16":
            return None  # the scaled gradients did not fit, as happens until the loss scale has found its size
        problem = f"{name} is {value}, {where or 'and was finite when the batch was run again: a hardware fault?'}"
        if train.guard.spike == "rollback" or (train.guard.spike == "skip" and "first in weight" not in where):
            self.guard.count(problem, number)
            return problem
        raise BigtrainError(
            f"{name} is {value} at step {number}: the run cannot go on;"
            f" {where or 'it was finite when the batch was run again: a hardware fault?'};"
            f" lower optimizer.lr (now {self.config.optimizer.lr}), lengthen schedule.warmup_steps or set"
            " train.grad_clip, and continue from the last checkpoint or in a new run_dir"
        )

    def _roll_back(self, problem: str) -> bool:
        """Continue from the last checkpoint without the data around this step. False if there is none yet: then only
        this update is left out."""
        if self.saver.pending:
            self._publish()
        heartbeat.phase(heartbeat.RESTORING, self.step)
        found, damaged = checkpoint_store.choose(self.run_dir, "auto", self.host)
        for line in damaged:
            self.hooks.on_warning(self.step, line)
        if found is None:
            return False
        left, guard = self.step, self.guard
        bad, left_out, spikes = guard.data_step(left), guard.left_out, guard.spikes
        with refusals(found.path):
            checkpoint_store.load(found, self.engine, self.transforms)
        self.step = self.saved_step = found.step
        self._begin()
        self.tokens = found.manifest["tokens"]
        guard.load_state(found.manifest.get("guard", {}))
        guard.left_out, guard.spikes = left_out, spikes  # all of it is data after that checkpoint
        margin = guard.config.skip_steps
        guard.leave_out(max(bad - margin, guard.data_step(self.step)), bad + margin)
        self.hooks.on_rollback(self.step, left)
        self.hooks.on_warning(left, f"{problem}; back to step {self.step}, without the data around it")
        return True

    def _log(self, window: _Window, outcome: StepOutcome, multiplier: float) -> None:
        """Metrics of the steps since the last log."""
        seconds = window.elapsed()
        tokens_per_second = window.tokens / seconds
        metrics = {
            "train/loss": window.nll_of_all / window.targets if window.targets else math.nan,
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
        mine = [0.0] * (2 * self.host.world_size)
        mine[2 * self.host.rank : 2 * self.host.rank + 2] = seconds / window.steps, self.forward.take() / window.steps
        of_all = self.host.sum(*mine)  # one small all-reduce
        metrics |= self.stragglers.metrics(of_all[::2], of_all[1::2])
        metrics |= self.info.planned
        for transform in self.transforms:
            metrics |= transform.metrics()
        if self.privacy is not None:
            metrics |= self.privacy.metrics(self.step)
        self.throughput.append(tokens_per_second)
        self.step_seconds.append(metrics["perf/step_seconds"])
        self.last_metrics = metrics
        if self.host.rank == 0:
            self.hooks.on_step(self.step, metrics)
            if slow := self.stragglers.judge(of_all[1::2], time.monotonic()):
                self.hooks.on_warning(self.step, slow)
        window.clear()

    def evaluate_meanwhile(self) -> dict[str, float]:
        """Metrics of what train.eval_batches ask for while the run goes on; of a sample by names of their own."""
        metrics = self.evaluate(self.held_out_sample)
        sample = self.held_out_sample
        return metrics if sample.whole else held_out.of_sample(metrics, sample.share)

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

    def _until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Raises _Stopped, before the same batch on every rank, once any of them was asked to stop."""
        for batch in batches:
            if any(self.host.sum(self.stop.is_set())):
                raise _Stopped
            yield batch

    def _totals(self, found: list[Evaluated], targets: int) -> Totals:
        """Of all ranks, on every rank."""
        names = list(found[0].sums) if found else []
        nll = sum(float(part.nll) for part in found)
        sums = [sum(float(part.sums[name]) for part in found) for name in names]
        total_nll, total_targets, *total_sums = self.host.sum(nll, targets, *sums)
        mine = [row for part in found for row in part.predictions]
        predictions = self.task.joined(dict(row for rows in self.host.gather(mine) for row in rows))
        return Totals(total_nll, int(total_targets), dict(zip(names, total_sums, strict=True)), predictions)

    def _save_last(self) -> None:
        """What the run ends with must be on the disk. Raises BigtrainError if it cannot be."""
        if self.saver.pending:
            self._publish()
        if self.step != self.saved_step:
            self._save(self.evaluate_meanwhile() if self.config.train.keep_best else {})
        if self.saver.pending and (problem := self._publish()):
            raise BigtrainError(problem)
        self.saver.close()

    def _save(self, seen: dict[str, float]) -> None:
        """Begin a checkpoint of this step; `seen`: what an evaluation has just found."""
        if not self.config.launch.shared_run_dir:  # its parts would lie on many machines, a whole one on none
            return
        heartbeat.phase(heartbeat.SAVING, self.step)
        if self.saver.pending:
            self._publish()
        if not guards.state_is_finite(self.engine, self.host):
            raise BigtrainError(
                f"weights or optimizer states are not finite after step {self.step}: not saved; lower optimizer.lr"
                f" (now {self.config.optimizer.lr}) and continue from the last checkpoint"
            )
        states = self.hooks.state() if self.host.rank == 0 else {}
        state = facts.of_run(self.config, self.task.tokenizer_file) | {
            "tokens": self.tokens,
            "sequences": self.sequences(),
            "config": changes.recorded(self.config),
            "labels": self.task.labels,
            "train_seconds": self._seconds(),
            "metric": facts.metric(self.config.train.objective, seen),
            "hooks": states,
            "guard": self.guard.state(),
        }
        self.saver.begin(self.step, state)
        self.saved_step = self.step
        if not self.config.train.async_save:
            self._publish()

    def _publish(self) -> str | None:
        """Finish the save that has begun. Where the disk refused, training goes on and says so; the reason if so."""
        heartbeat.phase(heartbeat.SAVING, self.step)
        saved = self.saver.finish()
        self.save_stall_seconds += saved.stall_seconds
        if saved.problem is None:
            self.guard.saved()
            self.hooks.on_checkpoint(saved.step, saved.path)
            return None
        self.failed_saves += 1
        if self.saved_step == saved.step:
            self.saved_step = -1  # so that a last save tries again
        self.hooks.on_warning(self.step, saved.problem)
        return saved.problem

    def _summary(self) -> dict[str, Any]:
        ordered, durations = sorted(self.throughput), sorted(self.step_seconds)
        loss = self.last_metrics.get("train/loss", math.nan)
        compressed = {name: value for name, value in self.last_metrics.items() if name.startswith("compress/")}
        return compressed | {
            "train/loss": loss if math.isfinite(loss) else None,
            "train/steps": self.step,
            "train/dropped_updates": self.guard.dropped,
            "data/tokens": self.tokens,
            "time/train_seconds": self.train_seconds,
            "time/save_stall_seconds": self.save_stall_seconds,
            "checkpoint/failed": self.failed_saves,
            "perf/tokens_per_second": ordered[len(ordered) // 2] if ordered else None,
            "perf/step_seconds": durations[len(durations) // 2] if durations else None,
            "perf/peak_memory_gib": peak_memory_gib(self.engine.device),
        }


class _Stopped(Exception):
    """A stop was asked for while the finished model was evaluated."""


class _Window:
    """What has accumulated since the last log; sums stay on the device until then."""

    nll: Tensor  # this rank's
    nll_of_all: float  # ranks, as of the last time it was read
    targets: float
    tokens: float
    steps: int

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clear()

    def clear(self) -> None:
        self.nll = torch.zeros((), dtype=torch.float64, device=self.device)
        self.nll_of_all, self.targets, self.tokens, self.steps = 0.0, 0.0, 0.0, 0
        self.started = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.started


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this rank has held: on a GPU what torch allocated there, on a CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
