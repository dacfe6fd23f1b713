"""The reference engine with DP-SGD (arXiv 1607.00133): gradients per example by Opacus, clipped, summed, noised.

Opacus listens to layers: from a layer's input and the gradient of its output it makes the gradient of each example.
That is wrong, without a word, where a weight is used outside of its layer or a layer does not see the batch, so before
the first step the engine holds some examples' gradients to those of a backward pass of each alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleHooks, register_grad_sampler
from opacus.grad_sample.embedding import compute_embedding_grad_sample
from opacus.grad_sample.layer_norm import compute_layer_norm_grad_sample
from opacus.grad_sample.linear import compute_linear_grad_sample
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from bigtrain.batch import Batch, LossSums
from bigtrain.config import Config
from bigtrain.engine.accelerate import AccelerateEngine
from bigtrain.engine.base import LossFunction, StepOutcome
from bigtrain.errors import BigtrainError
from bigtrain.models import Decoder, Encoder
from bigtrain.models.layers import Embedding, Linear
from bigtrain.models.lora import LoRALinear
from bigtrain.privacy import Privacy

CHECKED = 3  # examples whose gradients are held to a pass of each alone
TOLERANCE, FLOOR = 1e-3, 1e-5  # of a parameter's own gradient, and of the whole gradient's norm

PerExample = dict[nn.Parameter, Tensor]  # a parameter's gradients, one for each example in front: (B, *shape)


class PrivateEngine(AccelerateEngine):
    """An example's gradient is that of its summed loss; `scale` is not looked at: what the sum is divided by may not
    depend on who is in the batch, so it is the expected number of examples, train.global_batch."""

    def __init__(
        self, config: Config, build_model: Callable[[], nn.Module], device: torch.device, privacy: Privacy
    ) -> None:
        super().__init__(config, build_model, device)
        own_lookups(self.model)
        with _taken_apart():
            self.listening = GradSampleHooks(self.model, loss_reduction="sum", strict=False)  # check_gradients is
        self.private = NoisyOptimizer(self.optimizer, privacy, config.train.global_batch)
        self.checked = False

    def forward_backward(self, loss_function: LossFunction, batch: Batch, scale: float, last: bool) -> LossSums:
        if not self.checked:
            check_gradients(self.model, self.listening, loss_function, batch)
            self.checked = len(batch["tokens"]) > 1  # one says nothing of how many are told apart
        sums = loss_function(self.wrapped, batch)
        sums.loss.backward()
        self.private.clip_and_accumulate()
        self.private.drop_gradients()
        return LossSums(sums.loss.detach(), sums.nll)

    def step(self, lr_multiplier: float) -> StepOutcome:
        """The norm is that of the noised gradient. Clipping that (train.grad_clip) changes nothing of the promise."""
        self.private.add_noise()
        return super().step(lr_multiplier)

    def discard(self) -> None:
        self.private.drop_gradients()
        for parameter in self.private.params:
            parameter.summed_grad = None  # type: ignore[attr-defined]


class NoisyOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimizer, with the run's own noise, and with steps for which no example was drawn."""

    def __init__(self, optimizer: torch.optim.Optimizer, privacy: Privacy, expected_batch_size: int) -> None:
        promise = privacy.guarantee
        super().__init__(
            optimizer,
            noise_multiplier=promise.noise_multiplier,
            max_grad_norm=promise.max_grad_norm,
            expected_batch_size=expected_batch_size,
        )
        self.privacy = privacy

    @torch.no_grad()
    def add_noise(self) -> None:
        """The mean gradient over the expected batch, in `grad`."""
        sums = [torch.zeros_like(p) if p.summed_grad is None else p.summed_grad for p in self.params]
        for parameter, clipped, noise in zip(self.params, sums, self.privacy.noise(sums), strict=True):
            parameter.grad = (clipped + noise).div_(self.expected_batch_size)

    def drop_gradients(self) -> None:
        """Those of single examples, and their plain sum; the sum of the clipped ones stays."""
        for parameter in self.params:
            parameter.grad_sample = parameter.grad = None


# ------------------------------------------------------------------------------------ gradients per example


register_grad_sampler([Linear])(compute_linear_grad_sample)
register_grad_sampler([Embedding])(compute_embedding_grad_sample)


@register_grad_sampler(nn.LayerNorm)
def layer_norm_gradients(layer: nn.LayerNorm, activations: list[Tensor], backprops: Tensor) -> PerExample:
    """Opacus' own takes a bias for granted."""
    if layer.bias is not None:
        found: PerExample = compute_layer_norm_grad_sample(layer, activations, backprops)
        return found
    normed = F.layer_norm(activations[0], layer.normalized_shape, eps=layer.eps)
    return {layer.weight: (normed * backprops).flatten(1, -2).sum(1)}


@register_grad_sampler(LoRALinear)
def lora_gradients(layer: LoRALinear, activations: list[Tensor], backprops: Tensor) -> PerExample:
    """Of a change B A of low rank: dB = dy (A x)^T, dA = (B^T dy) x^T. Of the frozen weight there is none."""
    x, dy = activations[0], backprops * layer.scale
    return {
        layer.lora_a: torch.einsum("n...r,n...i->nri", dy @ layer.lora_b, x),
        layer.lora_b: torch.einsum("n...o,n...r->nor", dy, x @ layer.lora_a.T),
    }


def own_lookups(model: nn.Module) -> None:
    """Each example looks up positions and segments for itself: looked up once for all, a batch has one gradient of
    them, and Opacus would take tokens for examples."""
    for module in model.modules():
        if isinstance(module, (Encoder, Decoder)):
            module.register_forward_pre_hook(_spelled_out, with_kwargs=True)


def _spelled_out(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    tokens = args[0] if args else kwargs["tokens"]
    if kwargs.get("positions") is None:
        kwargs["positions"] = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    if isinstance(module, Encoder) and kwargs.get("token_types") is None:
        kwargs["token_types"] = torch.zeros_like(tokens)
    return args, kwargs


# ------------------------------------------------------------------------------------------ the proof of it


def check_gradients(model: nn.Module, listening: GradSampleHooks, loss: LossFunction, batch: Batch) -> None:
    """Hold the gradients of the first examples of `batch` to those of each alone, without dropout.

    Leaves no gradients and draws no random number. Raises BigtrainError naming the first parameter that is off.
    """
    count = min(CHECKED, len(batch["tokens"]))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with _without_dropout(model):
        with _taken_apart():
            together = per_example_gradients(trained, model, loss, {name: x[:count] for name, x in batch.items()})
        listening.disable_hooks()
        try:
            for row in range(count):
                loss(model, {name: x[row : row + 1] for name, x in batch.items()}).loss.backward()
                alone = {name: parameter.grad for name, parameter in trained.items()}
                model.zero_grad(set_to_none=True)
                _compare(row, count, together, alone)
        finally:
            listening.enable_hooks()


def per_example_gradients(
    trained: dict[str, nn.Parameter], model: nn.Module, loss: LossFunction, batch: Batch
) -> dict[str, Tensor | None]:
    """As Opacus has them, (B, *shape); None where it saw none. Leaves no gradients."""
    loss(model, batch).loss.backward()
    found = {name: getattr(parameter, "grad_sample", None) for name, parameter in trained.items()}
    for parameter in trained.values():
        parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]
    return found


def _compare(row: int, count: int, together: dict[str, Tensor | None], alone: dict[str, Tensor | None]) -> None:
    whole = torch.stack([gradient.norm() for gradient in alone.values() if gradient is not None]).norm()
    for name, gradient in alone.items():
        ours, way_out = together[name], f"train it without: train.freeze=[{name}]"
        if gradient is None or ours is None:
            problem = "has no gradient of its own for each example"
        elif ours.shape != (count, *gradient.shape):
            problem = "is not looked at by each example for itself"
        elif not (ours[row] - gradient).norm() <= TOLERANCE * gradient.norm() + FLOOR * whole:
            problem = "has other gradients per example than one example alone gives it"
        else:
            continue
        raise BigtrainError(f"train.privacy: {name} {problem}: clipping would not bound it; {way_out}")


@contextlib.contextmanager
def _taken_apart() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, NotImplementedError, AttributeError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BigtrainError(
            f"train.privacy: Opacus cannot take this model's gradients apart ({reason}); train changes of low rank"
            " (train.lora.rank=8), or not the layer that is in the way (train.freeze)"
        ) from error


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Only modules with weights of their own are training: Opacus listens to no others, and drops nothing there."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = next(module.parameters(recurse=False), None) is not None
        yield
    finally:
        for module, training in before:
            module.training = training
