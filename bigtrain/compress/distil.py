"""Knowledge distillation: the loss of a student that also learns what a teacher says of the same batch.

(1 - alpha) * task + alpha * (logits * T^2 KL + hidden * distance + attention * KL): Hinton, Vinyals & Dean (arXiv
1503.02531) for the logits, FitNets and TinyBERT (1412.6550, 1909.10351) for hidden states, MiniLMv2 (2012.15828) for
the relations among queries, among keys and among values, which models of other widths and numbers of heads share.

The teacher runs on the same micro-batch, without gradients, and gives its part through hooks that are there only for
the time of a forward pass: neither model knows of the other, and no state dict holds the teacher. Nothing in it is
random, so a resumed run goes on as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain import tasks
from bigtrain.batch import IGNORED, Batch, LossSums
from bigtrain.checkpoint import transfer
from bigtrain.checkpoint.weights import load_matching
from bigtrain.compress import teacher as teachers
from bigtrain.compress.teacher_cache import TeacherCache
from bigtrain.config import ClassificationConfig, Config
from bigtrain.engine.base import Engine, LossFunction
from bigtrain.engine.host import HostGroup
from bigtrain.models.heads import scored_rows
from bigtrain.models.soft_targets import SoftTargets, Teacher, TopK, WholeLogits, divergence
from bigtrain.transform import Transform

LABELLED = ("classification", "tagging")  # tasks whose model gives small logits: there is no head that fuses the loss


class Distil(Transform):
    """compress.distil."""

    name = "distil"

    def __init__(self, config: Config) -> None:
        assert config.compress.distil is not None
        assert config.compress.distil.teacher is not None
        self.config, self.settings, self.kind = config, config.compress.distil, config.task.kind
        self.path = Path(config.compress.distil.teacher)
        self.regression = isinstance(config.task, ClassificationConfig) and config.task.regression
        self.teacher: Any = None  # built when it is first asked

    def apply(self, model: nn.Module) -> None:
        """With `init_from_teacher`, the student's weights become the teacher's, of the layers that it learns from."""
        if self.settings.init_from_teacher:
            initialize(model, self.path, self.config)

    def attach(self, engine: Engine, host: HostGroup) -> None:
        self.device, self.host = engine.device, host
        self.task: Any = tasks.build(self.config)
        self.layers: list[int] = []  # of the teacher, for each of the student's
        if self.settings.hidden or self.settings.attention:
            theirs = teachers.count_layers(teachers.model_config(self.path, self.kind)) or 0
            self.layers = teachers.layer_map(self.settings.layers, len(layers(engine.model)), theirs)
        self.cache: TeacherCache | None = None
        if self.settings.cache_top_k:
            fingerprint = host.broadcast(teachers.fingerprint(self.path) if host.rank == 0 else None)
            self.cache = TeacherCache.of(self.config, fingerprint, host.rank)
        else:
            self._model()  # now, so that a teacher that cannot be used is told before the first step
        self._clear()

    def _model(self) -> Any:
        if self.teacher is None:
            self.teacher = teachers.build(self.config, self.task, self.device)
        return self.teacher

    # ---------------------------------------------------------------------------------------------- the loss

    def loss(self, function: LossFunction) -> LossFunction:
        settings = self.settings

        def distilled(model: nn.Module, batch: Batch) -> LossSums:
            student, scored = bare(model), scored_targets(batch)
            rows, theirs = self._taught(batch, scored)
            soft = SoftTargets(rows, settings.alpha, settings.temperature, settings.logits) if rows else None
            fused = soft is not None and fuses(student, self.kind)
            with watching(student, self.kind, bool(self.layers), soft if fused else None) as mine:
                sums = function(model, batch)
            taught = self._of_layers(mine, theirs, batch, scored)
            if self.regression:
                error = (mine.output.float() - theirs.output.float()).square().squeeze(-1)
                taught = taught + settings.logits * (error * scored.squeeze(-1)).sum()
            elif soft is not None and not fused:
                picked, of_rows = rows_of(mine.output, batch, self.kind), scored_rows_of(scored, batch, self.kind)
                taught = taught + settings.logits * divergence(picked, of_rows, soft)
            loss = sums.loss if fused else (1 - settings.alpha) * sums.loss
            self.total += taught.detach()
            if fused and soft is not None and soft.total is not None:
                self.total += settings.logits * soft.total
            self.targets += scored.sum()
            return LossSums(loss + settings.alpha * taught, sums.nll)

        return distilled

    def _taught(self, batch: Batch, scored: Tensor) -> tuple[Teacher | None, Seen]:
        """What the teacher says of the task's rows (None where they do not count), and what was seen inside it."""
        if self.cache is None:
            theirs = self._ask(batch)
            whole = theirs.rows if self.settings.logits and not self.regression else None
            return whole, theirs
        keys = self.cache.keys(batch, scored)
        missing = self.cache.missing(keys)
        asks = self.host.sum(len(missing))[0] if self.settings.teacher_sharded else len(missing)
        if asks:  # a teacher that is sharded needs all ranks
            theirs = self._ask(batch)
            assert theirs.rows is not None
            for index in missing:
                of_sample = torch.zeros_like(scored)
                of_sample[index] = scored[index]
                picked = theirs.rows.row(of_sample.flatten().nonzero().squeeze(-1))
                k, temperature = self.settings.cache_top_k, self.settings.temperature
                self.cache.add(keys[index], TopK.of(picked, int(of_sample.sum()), k, temperature))
        return self.cache.rows(keys, scored), Seen()

    @torch.no_grad()
    def _ask(self, batch: Batch) -> Seen:
        """Run the teacher."""
        model = self._model()
        inner, kept = bare(model), WholeLogits()
        fused = fuses(inner, self.kind)
        with watching(inner, self.kind, bool(self.layers), kept if fused else None) as seen:
            if fused:
                self.task.loss(model, batch)
                seen.rows = kept
            elif self.kind in LABELLED:
                self.task.outputs(model, batch)
            elif self.kind == "translation":
                model(batch["tokens"], batch["attention_mask"], batch["targets_in"])
            elif self.kind == "masked_lm":
                model(batch["tokens"], batch["attention_mask"], batch["token_types"])
            else:
                model(batch["tokens"])
        if not fused:
            seen.rows = WholeLogits(logits=rows_of(seen.output, batch, self.kind))
        return seen

    def _of_layers(self, mine: Seen, theirs: Seen, batch: Batch, scored: Tensor) -> Tensor:
        """Distances inside the models: means over real tokens, counted once for each target."""
        found = scored.new_zeros((), dtype=torch.float32)
        if not self.layers:
            return found
        settings = self.settings
        for index, layer in enumerate(self.layers):
            if settings.hidden:
                real = real_tokens(batch, mine.hidden[index])
                distance = hidden_distance(mine.hidden[index], theirs.hidden[layer], real, settings.hidden_distance)
                found = found + settings.hidden * distance
            if settings.attention:
                real = real_tokens(batch, mine.qkv[index][0])
                causal = self.kind in ("causal_lm", "instruction")
                found = found + settings.attention * relation_divergence(
                    mine.qkv[index], theirs.qkv[layer], real, causal
                )
        return found * (scored.sum() / len(self.layers))

    # ------------------------------------------------------------------------------------------------ metrics

    def metrics(self) -> dict[str, float]:
        """`train/distil_loss`: what the teacher's part comes to per target since the last time, before alpha."""
        total, targets = self.host.sum(float(self.total), float(self.targets))
        self._clear()
        return {"train/distil_loss": total / targets if targets else float("nan")}

    def _clear(self) -> None:
        self.total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.targets = torch.zeros((), dtype=torch.int64, device=self.device)


# ------------------------------------------------------------------------------------------ looking into models


@dataclass
class Seen:
    """Of one forward pass."""

    output: Any = None  # logits of the whole model, where they exist: (B, T, V), (B, T, labels) or (B, labels)
    rows: WholeLogits | None = None  # the same of the task's rows
    hidden: list[Tensor] = field(default_factory=list)  # (B, T, D) after each layer
    qkv: list[list[Tensor]] = field(default_factory=list)  # queries, keys, values (B, T, width) of each layer


@contextmanager
def watching(model: nn.Module, task: str, deep: bool, soft: SoftTargets | WholeLogits | None) -> Iterator[Seen]:
    """For the forward pass inside it: what the model gives, with `deep` what its layers give, and `soft` handed to its
    head."""
    seen, handles = Seen(), []
    if soft is not None:

        def hand(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return args, kwargs | {"soft": soft}

        handles.append(model.head.register_forward_pre_hook(hand, with_kwargs=True))  # type: ignore[union-attr]
    else:

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            seen.output = getattr(output, "logits", output)

        whole: Any = model.model if transfer.is_transformers(model) and task not in LABELLED else model
        handles.append(whole.register_forward_hook(keep))
    for layer in layers(model) if deep else ():
        handles.append(layer.register_forward_hook(_keep_hidden(seen)))
        attention: Any = getattr(layer, "attention", None)
        if hasattr(attention, "qkv"):
            handles.append(attention.qkv.register_forward_hook(_keep_qkv(seen, attention)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _keep_hidden(seen: Seen) -> Any:
    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.hidden.append(output[0] if isinstance(output, tuple) else output)

    return keep


def _keep_qkv(seen: Seen, attention: Any) -> Any:
    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        groups = (attention.n_heads, attention.n_kv_heads, attention.n_kv_heads)
        heads = output.unflatten(-1, (-1, attention.head_dim)).split(groups, dim=2)
        seen.qkv.append([part.flatten(2) for part in heads])

    return keep


def bare(model: Any) -> Any:
    """Without the engine around it."""
    while hasattr(model, "module"):
        model = model.module
    return model


def layers(model: Any) -> nn.ModuleList:
    """The stack of layers of a bare model, ours or transformers'; the longest list of modules that it has."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=len, default=nn.ModuleList())


def fuses(model: Any, task: str) -> bool:
    """Whether the model's head makes loss and gradient of some rows at a time (models/cross_entropy.py)."""
    return task not in LABELLED and not transfer.is_transformers(model)


# --------------------------------------------------------------------------------------------------- row by row


def scored_targets(batch: Batch) -> Tensor:
    """Boolean (B, T), or (B, 1) of labels of whole texts: what the loss sums over."""
    return batch["targets"] != IGNORED if "targets" in batch else (batch["index"] >= 0).unsqueeze(-1)


def rows_of(logits: Tensor, batch: Batch, task: str) -> Tensor:
    """(N, V): a row for each token, of masked words only for those that are to be restored."""
    return logits[scored_rows(batch["targets"])] if task == "masked_lm" else logits.flatten(0, -2)


def scored_rows_of(scored: Tensor, batch: Batch, task: str) -> Tensor:
    """(N,) boolean: which of these rows count."""
    return scored[scored_rows(batch["targets"])] if task == "masked_lm" else scored.flatten()


def real_tokens(batch: Batch, hidden: Tensor) -> Tensor:
    """(B, T) boolean: no padding. An unpadded encoder's hidden states have none."""
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    return mask.bool()


def hidden_distance(mine: Tensor, theirs: Tensor, real: Tensor, kind: str) -> Tensor:
    """Mean over real tokens of the squared difference (mean over D), or of 1 - cosine; (B, T, D) each."""
    x, y = mine[real].float(), theirs[real].float()
    return (x - y).square().mean() if kind == "mse" else (1 - F.cosine_similarity(x, y, dim=-1)).mean()


def relation_divergence(mine: list[Tensor], theirs: list[Tensor], real: Tensor, causal: bool) -> Tensor:
    """KL(teacher || student) of softmax(x x^T / sqrt(width)), the mean over queries, keys and values, relation heads
    and real tokens (MiniLMv2, arXiv 2012.15828, equation 5): (B, T, width) each, of any width.

    Holds (B, heads, T, T) float32 of both.
    """
    length = real.size(1)
    allowed = real[:, None, None, :]
    if causal:
        allowed = allowed & torch.ones(length, length, dtype=torch.bool, device=real.device).tril()
    found = mine[0].new_zeros((), dtype=torch.float32)
    for x, y in zip(mine, theirs, strict=True):
        heads = relation_heads(x.size(-1), y.size(-1))
        log_q, log_p = (_relations(part, heads, allowed) for part in (x, y))
        divergences = (log_p.exp() * (log_p - log_q)).sum(-1)  # (B, heads, T)
        found = found + divergences.mean(1)[real].mean() / len(mine)
    return found


def relation_heads(mine: int, theirs: int, width: int = 32) -> int:
    """As many as both widths can be cut into, in parts of about 32."""
    most = max(1, min(mine, theirs) // width)
    return next(heads for heads in range(most, 0, -1) if mine % heads == 0 and theirs % heads == 0)


def _relations(x: Tensor, heads: int, allowed: Tensor) -> Tensor:
    """(B, T, width) -> log-probabilities (B, heads, T, T)."""
    parts = x.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = parts @ parts.transpose(-1, -2) * parts.size(-1) ** -0.5
    return scores.masked_fill(~allowed, torch.finfo(torch.float32).min).log_softmax(-1)


# --------------------------------------------------------------------------------------- a student from the teacher


def initialize(model: nn.Module, path: Path, config: Config) -> None:
    """Copy the teacher's weights into the student, sharded or not: of the layers that it learns from, and all else
    that has the same name and shape."""
    settings = config.compress.distil
    assert settings is not None
    stack = layers(model)
    prefix = next(name for name, module in model.named_modules() if module is stack) + "."
    theirs = teachers.count_layers(teachers.model_config(path, config.task.kind))
    assert theirs is not None
    places: dict[int, list[int]] = {}
    for mine, layer in enumerate(teachers.layer_map(settings.layers, len(stack), theirs)):
        places.setdefault(layer, []).append(mine)

    def renamed() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in teachers.weights(path, model):
            if not name.startswith(prefix):
                yield name, tensor
                continue
            number, _, rest = name.removeprefix(prefix).partition(".")
            for mine in places.get(int(number), ()):
                yield f"{prefix}{mine}.{rest}", tensor

    transfer.check_fit(model, load_matching(model, renamed()), f"{teachers.FIELD}={settings.teacher}")
