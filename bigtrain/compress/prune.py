"""Unstructured pruning: weights of linear layers held at zero while the others train.

magnitude: Zhu & Gupta (arXiv 1710.01878). wanda: Sun et al. (arXiv 2306.11695), with the inputs of the very step after
which it prunes. movement: Sanh et al. (arXiv 2005.07683); there a pruned weight keeps a shadow that goes on learning
and may come back, here it is zero in the masters too, and its score stays as it was.

A weight that is pruned stays pruned. Which ones are is a function of the weights and scores, and of nothing else: not
of the ZeRO stage, nor of the number of ranks (but for how sums of gradients or inputs over ranks round).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.compress import select
from bigtrain.compress.layers import Layer, choose
from bigtrain.compress.masks import Masks, Part
from bigtrain.compress.schedule import fraction
from bigtrain.compress_config import PruneConfig, n_of_m
from bigtrain.engine import shards
from bigtrain.engine.base import Engine
from bigtrain.engine.host import HostGroup
from bigtrain.engine.shards import Flat
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.transform import Transform

FIELD = "compress.prune"
SCORE = "score."  # before a weight's name, in a checkpoint: its scores of movement


class Prune(Transform):
    name = "prune"
    stateful = True

    def __init__(self, config: PruneConfig) -> None:
        self.config = config
        self.pattern = n_of_m(config.pattern)
        self.first = 0 if config.method == "magnitude" else 1  # steps that it needs before it can judge
        self.norms: dict[str, Tensor] = {}  # wanda: sums of squares of each input, by layer
        self.listening: list[Any] = []
        self.scores: dict[int, Tensor] = {}  # movement: of each part

    def apply(self, model: nn.Module) -> None:
        """Raises ConfigError for a pattern that matches no layer, or groups of N:M that a layer's rows do not fill."""
        self.layers = choose(model, self.config.include, self.config.exclude, FIELD)
        for layer in self.layers if self.pattern else ():
            if _columns(layer) % self.pattern[1]:  # type: ignore[index]
                raise ConfigError(
                    f"{FIELD}.pattern", self.config.pattern,
                    f"{layer.module} has {_columns(layer)} inputs, not divisible by {self.pattern[1]}",  # type: ignore[index]
                    f"leave it out: {FIELD}.exclude=[{layer.module},...]",
                )  # fmt: skip

    def attach(self, engine: Engine, host: HostGroup) -> None:
        self.engine = engine
        self.masks = Masks(engine, self.layers)
        if self.config.method == "movement":
            self.scores = {index: torch.zeros_like(part.master) for index, part in enumerate(self.masks.parts)}
        self.index = {id(part.master): index for index, part in enumerate(self.masks.parts)}
        moving = self._score_step if self.config.method == "movement" else None
        shards.around_step(engine, moving, self.masks.after_step)

    def begin(self, step: int) -> None:
        if step == 0 and self._due(0):
            self.choose(fraction(self.config.schedule, 0))
        self._listen(step)

    def update(self, step: int) -> None:
        if self._due(step):
            self.choose(fraction(self.config.schedule, step))
        self._listen(step)

    def metrics(self) -> dict[str, float]:
        """Of all chosen weights, and of the layer that has lost most: at 1 it is gone, and maybe the model with it."""
        return {
            "compress/sparsity": self.masks.pruned / self.masks.weights,
            "compress/sparsity_of_emptiest_layer": self.masks.emptiest,
        }

    def state(self) -> dict[str, Tensor]:
        found = self.masks.packed()
        for layer in self.layers if self.scores else ():
            found[SCORE + layer.weight] = self.masks.whole(layer, self.scores).cpu().clone()
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        try:
            self.masks.unpack(state)
            for index, scores in self.scores.items():
                part = self.masks.parts[index]
                whole = state[SCORE + part.layer.weight]
                scores.copy_((whole.t() if part.layer.transposed else whole).reshape(-1)[part.start : part.stop])
        except (KeyError, ValueError) as error:
            raise BigtrainError(f"the checkpoint's masks are of other layers: none for {error.args[0]}") from None

    # ------------------------------------------------------------------------------------------------- when

    def _due(self, step: int) -> bool:
        """Whether more is to be pruned after `step` steps than before."""
        ramp = self.config.schedule
        held = fraction(ramp, step - 1) if step > self.first else 0.0
        return step >= self.first and fraction(ramp, step) > held

    def _listen(self, step: int) -> None:
        """For wanda, hear what the layers are given in the step to come, if it prunes after that."""
        for handle in self.listening:
            handle.remove()
        self.listening, self.norms = [], {}
        if self.config.method == "wanda" and self._due(step + 1):
            for layer in self.layers:
                module = self.engine.model.get_submodule(layer.module)
                self.listening.append(module.register_forward_pre_hook(partial(self._hear, layer.module)))

    @torch.no_grad()
    def _hear(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            squares = inputs[0].detach().float().flatten(0, -2).square().sum(0)
            self.norms[name] = self.norms[name] + squares if name in self.norms else squares

    def _score_step(self, flat: Flat) -> None:
        """The optimizer is about to step: score += -w * gradient of the weights that are left."""
        gradient = flat.key.grad
        if gradient is None:
            return
        gradient = gradient.detach().view(-1)
        for part in self.masks.of_flat[id(flat.key)]:
            change = part.master * gradient[part.offset : part.offset + part.master.numel()]
            self.scores[self.index[id(part.master)]].sub_(change)  # a pruned weight is zero: its score stays

    # ------------------------------------------------------------------------------------------------ which

    @torch.no_grad()
    def choose(self, share: float) -> None:
        """Choose anew which weights are pruned, `share` of the final sparsity of them; all ranks together."""
        if self.pattern or self.config.method == "wanda":
            for layer in self.layers:
                self._prune_rows(layer, share)
        elif self.config.scope == "global":
            self._prune_smallest(self.layers, share)
        else:
            for layer in self.layers:
                self._prune_smallest([layer], share)
        self.masks.enforce()

    def _prune_smallest(self, layers: list[Layer], share: float) -> None:
        """Exactly that many of the weights of `layers`, wherever they are."""
        first, end = {}, 0
        for layer in layers:
            first[layer.weight] = end
            end += layer.shape.numel()
        own = [(index, part) for index, part in enumerate(self.masks.parts) if part.layer.weight in first]
        pieces = [select.Piece(self._keys(index, part), first[part.layer.weight] + part.start) for index, part in own]
        total = partial(shards.total, self.engine)
        gone = sum(int((part.keep == 0).sum()) for _, part in own)  # more than `share` if the schedule has been changed
        count = max(round(self.config.sparsity * share * end), int(total(torch.tensor([gone]))))
        cut = select.cut(pieces, count, 33 if self.scores else 31, end, total)
        for piece, (_, part) in zip(pieces, own, strict=True):
            part.keep.copy_(~cut.chosen(piece.keys(), piece.first))

    def _keys(self, index: int, part: Part) -> Callable[[], Tensor]:
        """Whole numbers in the order of the scores, 0 for what is pruned already."""

        def magnitudes() -> Tensor:
            return (part.master.abs().view(torch.int32) + 1) * part.keep  # IEEE 754: without a sign, in order as bits

        def movements() -> Tensor:
            bits = self.scores[index].view(torch.int32).long()
            magnitude = bits & 0x7FFFFFFF
            return (torch.where(bits < 0, -magnitude, magnitude) + 2**31) * part.keep

        return movements if self.scores else magnitudes

    def _prune_rows(self, layer: Layer, share: float) -> None:
        """Of each row, or of each M neighbours in one, so many. On whole layers, one at a time: shards cut rows up."""
        parts = self.masks.parts
        values = self.scores or {index: part.master.abs() for index, part in enumerate(parts) if part.layer is layer}
        score = self.masks.whole(layer, values)
        kept = self.masks.whole(layer, {i: part.keep for i, part in enumerate(parts) if part.layer is layer})
        if self.config.method == "wanda":
            score = score * self._input_norms(layer).to(score.device)
        score[kept == 0] = -torch.inf
        groups = score.view(-1, self.pattern[1]) if self.pattern else score
        if self.pattern:
            count = int(share * (self.pattern[1] - self.pattern[0]) + 1e-9)
        else:
            count = round(self.config.sparsity * share * groups.shape[1])
        count = max(count, int((groups == -torch.inf).sum(dim=1).max()))
        order = groups.argsort(dim=1, stable=True)
        keep = torch.ones_like(groups, dtype=torch.uint8).scatter_(1, order[:, :count], 0)
        self.masks.set_whole(layer, keep.view_as(score))

    def _input_norms(self, layer: Layer) -> Tensor:
        """(columns,) the norm of each input over all ranks' micro-batches of this step."""
        found = self.norms.get(layer.module)
        if found is None:
            raise BigtrainError(
                f"{FIELD}.method=wanda: {layer.module} was given nothing to compute; leave it out with {FIELD}.exclude"
            )
        squares = found.clone()
        if self.engine.world_size > 1:
            torch.distributed.all_reduce(squares)
        return squares.sqrt()


def _columns(layer: Layer) -> int:
    return layer.shape[0 if layer.transposed else 1]
