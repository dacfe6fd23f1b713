"""`bigtrain verify`: can this machine, with these libraries and this config, be trusted with a long run?

The config is trained for a few steps under the reference engine in fp32 and under its own engine; once more, killed on
the way and resumed; and everything that should be the same is compared.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from bigtrain.checkpoint import newest
from bigtrain.config import AccelerateConfig, Config, GuardConfig
from bigtrain.diff import compare_curves, curve
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.launch import Stopped
from bigtrain.launch import train as launch
from bigtrain.launch.supervise import WORKER

STEPS, SAVE_EVERY = 12, 4
KILL_AT = 6  # steps done: two after a checkpoint
# Relative, of the loss and of the gradient's norm, which is a sum of squares and so differs more.
TOLERANCE = {"fp32": (1e-4, 1e-3), "bf16": (1e-2, 1e-1), "fp16": (1e-2, 1e-1)}


@dataclass(frozen=True)
class Check:
    name: str
    found: str
    passed: bool


def verify(config: Config, say: Callable[[str], None], console: Console | None = None) -> None:
    """Run the checks in `config.run_dir` and print a table. Raises BigtrainError if one fails, or if its own engine
    cannot run the config at all."""
    folder = Path(config.run_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("run_dir", str(folder), "is not an empty directory", "name a new one to verify in")
    short = shortened(config)
    checks = []
    say(f"configured: {STEPS} steps, {described(short)}")
    whole = _train(short, folder / "configured")
    say(f"reference: {STEPS} steps, {described(reference(short))}")
    checks += _against_reference(short, whole, folder / "reference")
    say(f"interrupted: as configured; a rank is killed after step {KILL_AT}, then the run continues")
    checks += _killed_and_resumed(short, whole, folder / "interrupted")
    (console or Console()).print(table(checks))
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise BigtrainError(
            f"this stack cannot be trusted with this config: {'; '.join(failed)}; the runs are in {folder}"
        )
    say(f"this stack can be trusted with this config: all {len(checks)} checks passed; the runs are in {folder}")


def shortened(config: Config) -> Config:
    """A few steps of it, to the same bits each time, with nothing sent anywhere."""
    train = replace(
        config.train, steps=STEPS, stop_at=None, save_every=SAVE_EVERY, eval_every=0, eval_batches=1,
        keep_checkpoints=STEPS, deterministic=True, objective="train/loss", guard=GuardConfig(),
        privacy=replace(config.train.privacy, seed=0),  # or each run would draw and add its own
    )  # fmt: skip
    return replace(
        config,
        resume="auto",
        train=train,
        schedule=replace(config.schedule, warmup_steps=min(config.schedule.warmup_steps, 2)),
        logger=replace(config.logger, log_every=1, progress=False, wandb=replace(config.logger.wandb, enabled=False)),
        launch=replace(config.launch, env={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} | config.launch.env),
    )


def reference(config: Config) -> Config:
    """The same training by plain data parallelism in fp32."""
    return replace(config, engine=AccelerateConfig(), train=replace(config.train, precision="fp32"))


def described(config: Config) -> str:
    engine = config.engine
    detail = engine.parallel if isinstance(engine, AccelerateConfig) else f"ZeRO stage {engine.stage}"
    return f"{engine.kind} ({detail}), {config.train.precision}"


def _train(config: Config, run: Path) -> Path:
    try:
        launch.train(replace(config, run_dir=str(run)), lambda line: None, lambda directory: "")
    except Stopped:
        raise KeyboardInterrupt from None
    return run


# --------------------------------------------------------------------------------------------------- checks


def _against_reference(config: Config, whole: Path, run: Path) -> list[Check]:
    same = "the loss of the reference engine"
    try:
        _train(reference(config), run)
    except BigtrainError as error:
        return [Check(same, f"the reference could not run: {error}", False)]
    checks = []
    tolerances = TOLERANCE[config.train.precision]
    for metric, tolerance in zip(("train/loss", "train/grad_norm"), tolerances, strict=True):
        compared = compare_curves(whole, run, metric)
        name = same if metric == "train/loss" else "its gradients' norm"
        found = (
            f"relative difference at most {compared.largest:.1e} over {compared.steps} steps (allowed: {tolerance:g})"
        )
        checks.append(Check(name, found, compared.steps == STEPS and compared.largest <= tolerance))
    losses = [loss for loss in curve(whole, "train/loss").values() if loss is not None]
    moved = len(losses) == STEPS and len(set(losses)) > 1
    found = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}" if losses else "no loss"
    return [Check("training changes the loss", found, moved), *checks]


def _killed_and_resumed(config: Config, whole: Path, run: Path) -> list[Check]:
    """SIGKILL a rank in the middle, continue from the checkpoint, and compare with the run that nobody touched."""
    # Slow enough to be hit in the middle: evaluating changes nothing that is learned.
    slow = replace(config, train=replace(config.train, eval_every=1, eval_batches=4))
    with _killer(run, KILL_AT) as killed, contextlib.suppress(BigtrainError):
        _train(slow, run)
    if not killed.is_set():
        return [
            Check("a rank killed in the middle", "the run was over before it could be hit; run verify again", False)
        ]
    try:
        _train(slow, run)  # where the launcher has restarted it by itself, there is nothing left to do
    except BigtrainError as error:
        return [Check("resumed after SIGKILL", str(error), False)]
    checks = []
    for metric in ("train/loss", "train/grad_norm"):
        compared = compare_curves(whole, run, metric)
        checks.append(Check(f"resumed after SIGKILL: {metric}", str(compared).partition(": ")[2], compared.identical))
    same, total = _same_weights(whole, run)
    found = f"the same bits in {same} of {total} tensors"
    checks.append(Check("resumed after SIGKILL: weights", found, 0 < total == same))
    return checks


def _same_weights(first: Path, second: Path) -> tuple[int, int]:
    """(tensors of the last checkpoints that have the same bits, tensors)."""
    import torch

    from bigtrain.checkpoint.weights import read_weights

    one, other = newest(first), newest(second)
    if one is None or other is None or one.name != other.name:
        return 0, 0
    ours, theirs = read_weights(one), read_weights(other)
    return sum(name in theirs and torch.equal(ours[name], theirs[name]) for name in ours), len({**ours, **theirs})


@contextlib.contextmanager
def _killer(run: Path, step: int) -> Iterator[threading.Event]:
    """While the body trains in `run`, wait for a step and SIGKILL the last rank, once. The event says that it did."""
    killed, over = threading.Event(), threading.Event()

    def wait() -> None:
        while not over.wait(0.005):
            if max(curve(run, "train/loss"), default=0) >= step:
                for process in _ranks(run):
                    process.kill()
                    killed.set()
                return

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def _ranks(run: Path) -> list[psutil.Process]:
    """The process of the run's last rank."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            arguments, environment = process.cmdline(), process.environ()
            is_rank = WORKER in arguments and str(run / "config.yaml") in arguments and "RANK" in environment
            if is_rank and int(environment["RANK"]) == int(environment["WORLD_SIZE"]) - 1:
                found.append(process)
    return found


def table(checks: list[Check]) -> Table:
    shown = Table("check", "found", "", box=box.SIMPLE_HEAD)
    for check in checks:
        shown.add_row(check.name, check.found, "yes" if check.passed else "NO")
    return shown
