"""Runs of the real trainer that go wrong on purpose, inside real ranks, for test_guards.py."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain import models
from bigtrain.batch import IGNORED, Batch, LossSums
from bigtrain.checkpoint import checkpoints
from bigtrain.config import Config, ModelConfig, from_dict, to_dict
from bigtrain.data.example_loader import Share
from bigtrain.engine.base import Engine
from bigtrain.engine.host import HostGroup
from bigtrain.errors import BigtrainError
from bigtrain.held_out import HeldOut
from bigtrain.hooks import Hook, Hooks, RunInfo
from bigtrain.tasks import Evaluated, Totals
from bigtrain.trainer import Trainer
from tests.distributed.curves import MICRO_BATCH, build, join, loss, make, sequences


class Nothing(HeldOut):
    def __iter__(self) -> Iterator[Batch]:
        return iter(())


class Pattern:
    """Learns a noisy repeating pattern. `evil` (a step of the data) has a batch that `do` spoils on `rank`."""

    def __init__(self, evil: int | None = None, do: str = "", rank: int = 0) -> None:
        self.evil, self.do, self.rank = evil, do, rank
        self.labels: list[str] = []
        self.tokenizer_file = Path(__file__)  # a checkpoint notes its hash

    def build_model(self, config: ModelConfig) -> nn.Module:
        return models.build(config)

    def train_loader(self, share: Share) -> Loader:
        return Loader(self, share)

    def held_out(self, share: Share, max_batches: int | None = None) -> HeldOut:
        return Nothing(0, share.global_batch, max_batches)

    def loss(self, model: nn.Module, batch: Batch) -> LossSums:
        sums = loss(model, batch)
        if "spoil" in batch:
            factor = {"nan": math.nan, "inf": math.inf, "spike": 30.0, "gradient": 1.0}[self.do]
            found = sums.loss * factor
            if self.do == "gradient":  # a finite loss whose gradient is none: d sqrt(x) / dx at 0
                found = found + (sums.loss - sums.loss.detach()).sqrt()
            return LossSums(found, sums.nll * factor)
        return sums

    def count_targets(self, batch: Batch) -> int:
        return int((batch["targets"] != IGNORED).sum())

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluated:
        raise NotImplementedError

    def joined(self, predictions: dict[int, Any]) -> dict[int, Any]:
        return predictions

    def metrics(self, totals: Totals) -> dict[str, float]:
        return {}

    def facts(self) -> dict[str, Any]:
        return {}


class Loader:
    def __init__(self, task: Pattern, share: Share) -> None:
        self.task, self.share = task, share

    def batches(self, step: int) -> list[Batch]:
        tokens, targets = sequences(step)
        made: list[Batch] = []
        for part in self.samples(step):
            rows = [sample - step * self.share.global_batch for sample in part]
            made.append({"tokens": tokens[rows], "targets": targets[rows]})
        if step == self.task.evil and self.share.rank == self.task.rank:
            made[-1]["spoil"] = torch.ones(())
        return made

    def samples(self, step: int) -> list[list[int]]:
        each = self.share.global_batch // self.share.world_size
        first = step * self.share.global_batch + self.share.rank * each
        return [list(range(at, at + MICRO_BATCH)) for at in range(first, first + each, MICRO_BATCH)]


class Recorder(Hook):
    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.warnings: list[str] = []

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self.losses[step] = metrics["train/loss"]

    def on_warning(self, step: int, message: str) -> None:
        self.warnings.append(message)


class Damaging(Hook):
    """Flips a bit in the largest file of the checkpoint of a step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def on_checkpoint(self, step: int, path: Path) -> None:
        if step == self.at:
            self.at = -1  # once
            largest = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
            data = bytearray(largest.read_bytes())
            data[len(data) // 2] ^= 1
            largest.write_bytes(data)


def trainer(
    config: Config, engine: Engine, host: HostGroup, task: Pattern, folder: Path, *more: Hook
) -> tuple[Trainer, Recorder]:
    share = Share(host.rank, host.world_size, config.train.global_batch, MICRO_BATCH, 0)
    recorder = Recorder()
    info = RunInfo(folder, config, host.rank, host.world_size, "CPU", 0, 0.0, None, None, 0, False)
    hooks = Hooks([recorder, *more])
    return Trainer(config, folder, engine, host, task, share, hooks, info, Event()), recorder


def configured(choice: dict[str, Any], precision: str, steps: int, guard: dict[str, Any], **train: Any) -> Config:
    data = to_dict(make(choice, precision))
    data["train"] |= {"steps": steps, "guard": guard} | train
    return from_dict(data)


def spoiled(choices: dict[str, dict[str, Any]], precision: str, ways: list[str]) -> dict[str, Any]:
    """{way: {engine: what the run said, whether its weights are finite}}; the data of step 3 is bad."""
    host = join()
    return {do: _spoiled(host, choices, precision, do) for do in ways}


def _spoiled(host: HostGroup, choices: dict[str, dict[str, Any]], precision: str, do: str) -> dict[str, Any]:
    found = {}
    for name, choice in choices.items():
        with tempfile.TemporaryDirectory() as folder:
            config = configured(choice, precision, 6, {})
            engine = build(config)
            if do == "weight":
                run, recorder = trainer(config, engine, host, Pattern(), Path(host.broadcast(folder)))
                with torch.no_grad():
                    hook = poison_weight(engine)
            else:
                run, recorder = trainer(config, engine, host, Pattern(3, do, rank=host.world_size - 1), Path(folder))
                hook = None
            try:
                run.fit()
                message = "nothing was found"
            except BigtrainError as error:
                message = str(error)
            if hook is not None:
                hook.remove()
            finite = all(bool(tensor.isfinite().all()) for _, tensor in engine.weights() if tensor.numel())
            found[name] = {"message": message, "finite": finite, "steps": len(recorder.losses)}
    return found


def poison_weight(engine: Engine) -> Any:
    """A module of block 1 finds NaN in a weight of its own, on the last rank, as a flipped bit would leave one."""
    module = dict(engine.model.named_modules())["blocks.1.attention.out"]
    last = torch.distributed.get_world_size() - 1

    def spoil(module: nn.Module, _: Any) -> None:
        if torch.distributed.get_rank() == last:
            module.weight.data.view(-1)[0] = math.nan  # type: ignore[union-attr, operator]

    return module.register_forward_pre_hook(spoil)


def dropped(choices: dict[str, dict[str, Any]], precision: str) -> dict[str, Any]:
    """{engine: whether a step that was discarded left no trace in losses and weights}, against one that never was."""
    host = join()
    found = {}
    for name, choice in choices.items():
        config = make(choice, precision)
        outcomes = []
        for discards in (False, True):
            engine = build(config)
            curve = []
            for step in range(6):
                for kind in ("discarded", "kept") if discards and step in (0, 3) else ("kept",):
                    loader = Loader(Pattern(), Share(host.rank, host.world_size, 8, MICRO_BATCH, 0))
                    batches = loader.batches(step if kind == "kept" else 100)
                    for index, batch in enumerate(batches):
                        sums = engine.forward_backward(loss, batch, 1 / 200, index == len(batches) - 1)
                        if kind == "kept":
                            curve.append(float(sums.nll))
                    if kind == "kept":
                        engine.step(1.0)
                    else:
                        engine.discard()
            outcomes.append((curve, [tensor.clone() for _, tensor in engine.weights()]))
        (curve, weights), (other, others) = outcomes
        found[name] = curve == other and all(map(torch.equal, weights, others))
    return found


def spikes(choice: dict[str, Any], policies: list[str], folder: str) -> dict[str, Any]:
    """{policy: what became of a run of 32 steps with a spike in the data of step 24}."""
    host = join()
    return {policy: _spikes(host, choice, policy, Path(folder) / policy) for policy in policies}


def _spikes(host: HostGroup, choice: dict[str, Any], policy: str, folder: Path) -> dict[str, Any]:
    damaging = [Damaging(20)] if policy == "rollback over a damaged checkpoint" and host.rank == 0 else []
    guard = {"spike": policy.split()[0], "skip_steps": 1, "spike_window": 20}
    config = configured(choice, "fp32", 32, guard, save_every=10)
    engine = build(config)
    run, recorder = trainer(config, engine, host, Pattern(24, "spike"), folder, *damaging)
    result = run.fit()
    seen = {"losses": recorder.losses, "warnings": recorder.warnings, "left_out": run.guard.left_out,
            "dropped": result["train/dropped_updates"], "saved": checkpoints(folder)[-1].manifest["guard"]}  # fmt: skip
    # The last steps again, from the checkpoint of step 30: it must know what was left out.
    (checkpoint,) = [kept for kept in checkpoints(folder) if kept.step == 30]
    run, recorder = trainer(config, build(config), host, Pattern(24, "spike"), folder / "resumed")
    run.restore(checkpoint)
    run.fit()
    return json.loads(json.dumps(seen | {"resumed": recorder.losses}))


def flipped(choices: dict[str, dict[str, Any]], precision: str) -> dict[str, Any]:
    """{engine: what the run says with replays on, of a good device and of one whose 9th pass on rank 1 is off by a
    bit}."""
    host = join()
    found = {}
    for name, choice in choices.items():
        said = []
        for bad in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                config = configured(choice, precision, 6, {"replay_every": 2}, deterministic=True)
                engine = build(config, dropout=0.1)
                torch.manual_seed(host.rank)
                run, recorder = trainer(config, engine, host, Pattern(), Path(host.broadcast(folder)))
                module = dict(engine.model.named_modules())["blocks.0.attention.out"]
                hook = module.register_forward_hook(flip_a_bit(9 if bad and host.rank == 1 else 0))
                try:
                    run.fit()
                    said.append(list(recorder.losses.values()))
                except BigtrainError as error:
                    said.append(str(error))
                hook.remove()
                host.gather(None)  # rank 0's folder is everybody's
        with tempfile.TemporaryDirectory() as folder:  # and without replays: they must change nothing
            config = configured(choice, precision, 6, {}, deterministic=True)
            engine = build(config, dropout=0.1)
            torch.manual_seed(host.rank)
            run, recorder = trainer(config, engine, host, Pattern(), Path(host.broadcast(folder)))
            run.fit()
            said.append(list(recorder.losses.values()))
            host.gather(None)
        found[name] = said
    return found


def flip_a_bit(at: int) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    """Of what a module gives in its call number `at`: a middle bit (lower ones drown when the output is added to a
    larger number) in the first numbers (dropout may take one away)."""
    calls = itertools.count(1)

    def flip(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor | None:
        if next(calls) != at:
            return None
        changed = output.clone()
        changed.detach().view(-1)[:8].view(torch.int32).bitwise_xor_(1 << 16)
        return changed

    return flip
