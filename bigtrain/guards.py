"""What acts on a run that goes wrong: losses and gradients that are not finite, spikes, bits that flip.

Hooks only watch; a guard may drop an update, send the run back, or end it. It decides from numbers that all ranks
share, so that all decide alike, and what it decided is in the checkpoint: a resumed run decides the same again.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bigtrain.batch import Batch
from bigtrain.checks import LEAST_HISTORY
from bigtrain.config import GuardConfig
from bigtrain.engine.base import Engine, LossFunction
from bigtrain.engine.host import HostGroup
from bigtrain.errors import BigtrainError

SIGMAS_PER_MAD = 1.4826  # of a normal distribution: its standard deviation from its median absolute deviation
LEAST_SPREAD = 0.01  # of the median: losses that happen to be all alike do not make the next one a spike
SHOWN_SAMPLES = 16


class Guard:
    """Judges each step before its update, and keeps what a resumed run must know of that."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.spike_window)  # of the last updates, newest last
        self.left_out: list[tuple[int, int]] = []  # steps of data, first to last, that no step trains on; sorted
        self.dropped = 0  # updates
        self.spikes = 0  # since the run last made progress

    def data_step(self, step: int) -> int:
        """Which step of the data optimizer step `step` trains on: the step-th (from 0) that is not left out."""
        for first, last in self.left_out:
            if step < first:
                break
            step += last - first + 1
        return step

    def leave_out(self, first: int, last: int) -> None:
        """These steps of data, from now on. Steps that are done must not be among them: their data would change."""
        ranges: list[tuple[int, int]] = []
        for start, end in sorted([*self.left_out, (first, last)]):
            if ranges and start <= ranges[-1][1] + 1:
                ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
            else:
                ranges.append((start, end))
        self.left_out = ranges

    def spike(self, loss: float) -> str | None:
        """Whether this loss (per token, of all ranks) is a spike: why it is one. Otherwise it joins the others."""
        watched = self.config.spike != "off"
        limit = spike_limit(self.losses, self.config.spike_deviations) if watched else None
        if limit is not None and loss > limit:
            if self.config.spike == "warn":
                self.losses.append(loss)
            return f"loss {loss:.4g} is a spike (median of the last {len(self.losses)}: {self._median():.4g})"
        if watched:
            self.losses.append(loss)
        if self.config.spike == "skip":
            self.spikes = 0
        return None

    def count(self, problem: str, step: int) -> None:
        """Note a problem that the run goes on from. Raises BigtrainError if there were too many of them."""
        self.spikes += 1
        self.dropped += 1
        if self.spikes > self.config.max_spikes:
            raise BigtrainError(
                f"step {step}: {problem}; {self.config.max_spikes} before it in a row were no better"
                " (train.guard.max_spikes): the run cannot go on; lower optimizer.lr and continue in a new run_dir"
            )

    def saved(self) -> None:
        """A checkpoint was written: progress, for a run that goes back to checkpoints."""
        if self.config.spike == "rollback":
            self.spikes = 0

    def replays(self, step: int) -> bool:
        return self.config.replay_every > 0 and (step + 1) % self.config.replay_every == 0

    def _median(self) -> float:
        return statistics.median(self.losses)

    def state(self) -> dict[str, Any]:
        """JSON-able, for the checkpoint."""
        return {"losses": list(self.losses), "left_out": [list(pair) for pair in self.left_out],
                "dropped": self.dropped, "spikes": self.spikes}  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """What `state` gave; of a checkpoint from before there were guards, nothing."""
        self.losses = deque(state.get("losses", []), maxlen=self.config.spike_window)
        self.left_out = [(int(first), int(last)) for first, last in state.get("left_out", [])]
        self.dropped, self.spikes = state.get("dropped", 0), state.get("spikes", 0)


def spike_limit(losses: Sequence[float], deviations: float) -> float | None:
    """Above it a loss is a spike: the median of `losses` and so many robust standard deviations (1.4826 times the
    median absolute deviation, which a few outliers do not move). None while there are too few to tell."""
    if len(losses) < LEAST_HISTORY:
        return None
    median = statistics.median(losses)
    spread = SIGMAS_PER_MAD * statistics.median(abs(loss - median) for loss in losses)
    return median + deviations * max(spread, LEAST_SPREAD * abs(median))


# -------------------------------------------------------------------------------------- the same batch again


class RandomState(NamedTuple):
    """Of this rank: with it a batch that is run again drops out the same."""

    cpu: Tensor
    cuda: Tensor | None

    @staticmethod
    def now(device: torch.device) -> RandomState:
        return RandomState(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


class Step(NamedTuple):
    """What one rank ran for one step, so that it can be run again."""

    number: int  # optimizer steps done before it
    micro_batches: list[Batch]  # on the CPU
    samples: Callable[[], list[list[int]]]  # window or example numbers of each
    scale: float  # of the loss
    random: RandomState  # before the first micro-batch


def diagnose(step: Step, engine: Engine, loss: LossFunction, host: HostGroup) -> str:
    """Run the step again, with an eye on every tensor, and say where the first is that is not finite.

    Leaves no gradients. Every rank calls it, and gets the same text: rank, micro-batch, samples, tensor.
    """
    found = None
    step.random.restore(engine.device)
    for index, batch in enumerate(step.micro_batches):
        last = index == len(step.micro_batches) - 1
        with _watching(engine.model) as first_bad:
            sums = engine.forward_backward(loss, _moved(batch, engine.device), step.scale / engine.loss_scale, last)
        if first_bad or not math.isfinite(float(sums.nll)):
            found = found or (index, first_bad[0] if first_bad else "the loss", step.samples()[index])
    engine.discard()
    reports = [(report, rank) for rank, report in enumerate(host.gather(found)) if report]
    if not reports:
        return ""
    (index, where, samples), rank = min(reports, key=lambda pair: (pair[0][0], pair[1]))
    shown = ", ".join(map(str, samples[:SHOWN_SAMPLES])) + (", ..." if len(samples) > SHOWN_SAMPLES else "")
    return f"first in {where} (rank {rank}, micro-batch {index}, samples {shown})"


@contextlib.contextmanager
def _watching(model: nn.Module) -> Iterator[list[str]]:
    """Names, first to last, of what is not finite: weights, outputs of modules, this rank's gradients."""
    bad: list[str] = []

    def before(name: str) -> Callable[[nn.Module, Any], None]:
        def check(module: nn.Module, _arguments: Any) -> None:  # after DeepSpeed's own hook has gathered the weights
            for own, parameter in module.named_parameters(recurse=False):
                if not _finite(parameter.detach()):
                    bad.append(f"weight {_joined(name, own)}")

        return check

    def after(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def check(_module: nn.Module, _arguments: Any, output: Any) -> None:
            outputs = output if isinstance(output, (tuple, list)) else [output]
            if not all(_finite(tensor.detach()) for tensor in outputs if isinstance(tensor, Tensor)):
                bad.append(f"the output of {name or 'the model'}")

        return check

    def gradient(name: str) -> Callable[[Tensor], None]:
        def check(tensor: Tensor) -> None:
            if not _finite(tensor):
                bad.append(f"the gradient of {name}")

        return check

    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(name)))
        handles.append(module.register_forward_hook(after(name)))
    handles += _hook_gradients(model, gradient)
    try:
        yield bad
    finally:
        for handle in handles:
            handle.remove()


def _hook_gradients(model: nn.Module, make: Callable[[str], Callable[[Tensor], None]]) -> list[Any]:
    """Each gradient as it is computed, before any rank's is added. FSDP2's sharded parameters never see theirs."""
    return [
        parameter.register_hook(make(name)) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]


def check_replay(step: Step, engine: Engine, loss: LossFunction, host: HostGroup) -> None:
    """Run the step's first micro-batch twice and compare the bits of its loss and of each gradient (by their sums).

    Leaves no gradients and the random state as it was. Raises BigtrainError on every rank, naming those that differ.
    """
    first, second = (_fingerprint(step, engine, loss) for _ in range(2))
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    wrong = [(rank, name) for rank, name in enumerate(host.gather(names[0] if names else None)) if name]
    if wrong:
        where = ", ".join(f"rank {rank} (in {name})" for rank, name in wrong)
        raise BigtrainError(
            f"step {step.number + 1}: the same micro-batch gave other bits when it was run again, on {where}:"
            " that device cannot be trusted; take it out and continue from the last checkpoint"
        )


def _fingerprint(step: Step, engine: Engine, loss: LossFunction) -> dict[str, int]:
    """Sums over the bits of the loss and, by parameter name, of each gradient."""
    sums: dict[str, Tensor] = {}

    def add(name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            sums[name] = _bits(gradient)

        return hook

    handles = _hook_gradients(engine.model, add)
    try:
        batch = _moved(step.micro_batches[0], engine.device)
        sums["the loss"] = _bits(engine.forward_backward(loss, batch, step.scale, True).loss)
    finally:
        for handle in handles:
            handle.remove()
    engine.discard()
    step.random.restore(engine.device)
    return {name: int(value) for name, value in sums.items()}


def _bits(tensor: Tensor) -> Tensor:
    """int64 scalar on the tensor's device: the sum of its elements' bits, read as whole numbers."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(-1).view(whole).sum(dtype=torch.int64)


# ------------------------------------------------------------------------------------------- the whole state


@torch.no_grad()
def state_is_finite(engine: Engine, host: HostGroup) -> bool:
    """Whether this and every other rank's weights, master weights and optimizer states are finite, as far as they are
    in memory. One pass over them: far less than writing them takes."""
    tensors = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.model.parameters()]
    tensors += [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    for state in engine.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    plain = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    (bad,) = host.sum(not all(_finite(tensor.detach()) for tensor in plain))
    return not bad


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel() or type(tensor) not in (Tensor, nn.Parameter):
        return True  # quantised states are scales and codes of a library's own
    return math.isfinite(torch.linalg.vector_norm(tensor, math.inf))


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
