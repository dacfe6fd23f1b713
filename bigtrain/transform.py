"""What a transform is: it changes the model, where a hook only watches."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from bigtrain.engine.base import Engine, LossFunction
from bigtrain.engine.host import HostGroup
from bigtrain.errors import BigtrainError

FOLDER = "compress"  # of a checkpoint: a file of tensors for each transform that has state


class Transform:
    """One change to the model, in the order of a run. Every method does nothing, so that each writes only its own.

    apply -> (engine is built) -> attach -> load_state if the run is resumed -> begin -> update after each optimizer
    step -> state at each save -> finalize at export. All ranks call all of them together.
    """

    name = "transform"  # its key in config.compress, and its file's name in a checkpoint
    stateful = False  # whether a checkpoint without its state cannot be continued from

    def apply(self, model: nn.Module) -> nn.Module | None:
        """Change the model before it is sharded (under ZeRO-3 its parameters may be already: shapes are `ds_shape`),
        or return another in its place. Raises ConfigError where the config asks for what the model does not have."""

    def attach(self, engine: Engine, host: HostGroup) -> None:
        """The engine is there: take hold of what is needed of it."""

    def loss(self, function: LossFunction) -> LossFunction:
        """What the training loss becomes: another function of (wrapped model, batch on the device), with sums over the
        same targets. Called once, after `attach`. Evaluation keeps the task's own loss."""
        return function

    def begin(self, step: int) -> None:
        """Training is about to go on from `step` optimizer steps done (0: a new run)."""

    def update(self, step: int) -> None:
        """`step` optimizer steps are done now; where the last one was left out (overflow, guard) this is called too."""

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl, at each logged step, under names like compress/sparsity."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, in full coordinates, as tensors on the CPU: the same at every stage and number of
        ranks. Rank 0's is written; it may not share memory with what training changes."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """With what `state` gave to the checkpoint; every rank gets the whole of it."""

    def finalize(self, model: nn.Module) -> nn.Module:
        """At export, in one process: of the plain model with the trained weights, what is to be exported."""
        return model


def apply(transforms: Iterable[Transform], model: nn.Module) -> nn.Module:
    """All of them, in order, on a model that no engine has yet.

    Raises BigtrainError for one that an engine has: what it has sharded, or given an optimizer, would not be the model
    that is trained then. ConfigError as each `Transform.apply` does.
    """
    for transform in transforms:
        if getattr(model, "in_engine", False):
            raise BigtrainError(
                f"compress.{transform.name}: asked for after the model was sharded; transforms come first, where the"
                " model is built (build_model of bigtrain.engine.start.build)"
            )
        model = transform.apply(model) or model
    return model


def path_in(checkpoint: Path, transform: Transform) -> Path:
    return checkpoint / FOLDER / f"{transform.name}.safetensors"


def load(transforms: Iterable[Transform], files: Path, checkpoint: Path) -> None:
    """Give each transform its state from `files`, which is `checkpoint` in the clear.

    Raises BigtrainError for one that cannot go on without and finds none.
    """
    from safetensors.torch import load_file

    for transform in transforms:
        path = path_in(files, transform)
        if path.is_file():
            transform.load_state(load_file(path))
        elif transform.stateful:
            raise BigtrainError(
                f"{checkpoint} holds no state of compress.{transform.name} ({path.relative_to(files)}), without"
                " which this run cannot be continued; start a new one from its weights: init_from="
                f"{checkpoint} run_dir=ANOTHER"
            )
