"""Gradients per example are those of each example alone, whatever the model; and what becomes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from bigtrain import models
from bigtrain.batch import IGNORED, Batch, LossSums
from bigtrain.config import Config, DecoderConfig, EncoderConfig, LoRAConfig, from_dict
from bigtrain.engine import start
from bigtrain.engine.private import PrivateEngine, per_example_gradients
from bigtrain.errors import BigtrainError
from bigtrain.models.heads import ClassificationHead, TaggingHead
from bigtrain.models.lora import add_lora
from bigtrain.privacy import Guarantee, Privacy
from bigtrain.tasks.labelled import WithHead, build_encoder

SIZE: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 64, "max_seq_len": 16}
LABELS = 5


@pytest.fixture(scope="module", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def batch(rows: int = 6, seed: int = 0) -> Batch:
    """Texts of different lengths, one as long as the batch; a label for each, and one for each token."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 64, (rows, 16), generator=draw)
    mask = (torch.arange(16) < torch.randint(4, 17, (rows, 1), generator=draw)).long()
    mask[0] = 1
    tags = torch.randint(0, LABELS, (rows, 16), generator=draw).where(mask.bool(), IGNORED)
    label = torch.randint(0, LABELS, (rows,), generator=draw)
    return {"tokens": tokens, "attention_mask": mask, "label": label, "tags": tags}


def classify(model: nn.Module, batch: Batch) -> LossSums:
    loss = F.cross_entropy(model(batch["tokens"], batch["attention_mask"]), batch["label"], reduction="sum")
    return LossSums(loss, loss.detach())


def tag(model: nn.Module, batch: Batch) -> LossSums:
    logits = model(batch["tokens"], batch["attention_mask"]).flatten(0, 1)
    loss = F.cross_entropy(logits, batch["tags"].flatten(), ignore_index=IGNORED, reduction="sum")
    return LossSums(loss, loss.detach())


def answer(model: nn.Module, batch: Batch) -> LossSums:
    return LossSums(*model(batch["tokens"], batch["tokens"].where(batch["tags"] != IGNORED, IGNORED)))


def classifier(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    backbone = build_encoder(EncoderConfig(**SIZE, **{"dropout": 0.0} | fields), pooled=True)
    return spread(WithHead(backbone, ClassificationHead(backbone.config, LABELS, 0.0), pooled=True))


def tagger() -> nn.Module:
    torch.manual_seed(0)
    backbone = build_encoder(EncoderConfig(**SIZE, dropout=0.0), pooled=False)
    return spread(WithHead(backbone, TaggingHead(backbone.config, LABELS, 0.0), pooled=False))


def decoder(lora: bool = True, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    model = models.build(DecoderConfig(**SIZE, **fields))
    if lora:
        add_lora(model, LoRAConfig(rank=3))
    return spread(model)


@torch.no_grad()
def spread(model: nn.Module) -> nn.Module:
    """Biases and LoRA's B begin at 0, where some gradients are 0 too: elsewhere none is."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def promise(noise: float = 0.0, clip: float = 1e9) -> Privacy:
    return Privacy(Guarantee(noise, clip, 0.1, 1e-5, "rdp", 60, False), b"s" * 32, 10)


def config(**train: Any) -> Config:
    return from_dict(
        {
            "engine": {"kind": "accelerate"},
            "optimizer": {"kind": "adamw", "lr": 1e-2, "eps": 1e-3},  # gradients that are 0 but for rounding stay so
            "train": {"precision": "fp32", "global_batch": 6, "grad_clip": 0.0, **train},
        }
    )


def engine(build: Callable[[], nn.Module], privacy: Privacy | None, **train: Any) -> Any:
    AcceleratorState._reset_state(True)
    built = start.build(config(**train), build, torch.device("cpu"), privacy)
    built.model.train()
    return built


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., LossSums]]] = {
    "recipe": (lambda: classifier(norm_first=True), classify),
    "bert": (classifier, classify),
    "modern": (lambda: classifier(norm="rmsnorm", positions="rotary", activation="geglu", pooler=False), classify),
    "no biases": (lambda: classifier(bias=False, norm_first=True), classify),
    "tagging": (tagger, tag),
    "lora": (lambda: decoder(positions="rotary", norm="rmsnorm", activation="swiglu", n_kv_heads=1), answer),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_per_example_are_those_of_each_alone(case: str) -> None:
    build, loss = CASES[case]
    built, rows = engine(build, promise()), batch()
    trained = {name: parameter for name, parameter in built.model.named_parameters() if parameter.requires_grad}
    together = per_example_gradients(trained, built.model, loss, rows)
    plain = build().train()
    of_all = dict(plain.named_parameters())
    for row in range(6):
        plain.zero_grad()
        loss(plain, {name: x[row : row + 1] for name, x in rows.items()}).loss.backward()
        for name in trained:
            alone = of_all[name].grad
            assert alone is not None
            assert together[name] is not None, name
            torch.testing.assert_close(together[name][row], alone, rtol=1e-4, atol=1e-6, msg=f"{name}, example {row}")
    built.forward_backward(loss, rows, 1.0, True)  # the engine's own check agrees
    assert built.checked


def test_without_noise_and_clipping_it_is_the_plain_update() -> None:
    """Three steps of two micro-batches, weights included."""
    private, plain = (engine(classifier, privacy) for privacy in (promise(), None))
    for step in range(3):
        for built in (private, plain):
            for half in (slice(0, 4), slice(4, 6)):
                part = {name: x[half] for name, x in batch(seed=step).items()}
                built.forward_backward(classify, part, 1 / 6, half.stop == 6)
            outcome = built.step(1.0)
            assert outcome.applied
    for (name, ours), theirs in zip(private.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_each_example_counts_at_most_the_clipping_norm() -> None:
    clip = 0.05
    built = engine(classifier, promise(clip=clip))
    rows = batch()
    plain = classifier().train()
    wanted = [torch.zeros_like(parameter) for parameter in plain.parameters()]
    for row in range(6):
        plain.zero_grad()
        classify(plain, {name: x[row : row + 1] for name, x in rows.items()}).loss.backward()
        gradients = [parameter.grad for parameter in plain.parameters()]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()  # type: ignore[union-attr]
        assert norm > clip
        for total, gradient in zip(wanted, gradients, strict=True):
            total += gradient * (clip / norm)  # type: ignore[operator]
    built.forward_backward(classify, rows, 1.0, True)
    for parameter, total in zip(built.model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.summed_grad, total, rtol=1e-3, atol=1e-6)
    built.discard()
    assert all(parameter.grad is None and parameter.summed_grad is None for parameter in built.model.parameters())


def test_a_step_without_examples_is_noise_of_the_promised_size() -> None:
    """What the optimizer is given then: noise_multiplier * max_grad_norm / the expected batch."""
    seen: list[Tensor] = []

    def keep(*_: Any) -> None:
        seen.append(torch.cat([parameter.grad.flatten() for parameter in built.model.parameters()]))  # type: ignore

    built = engine(classifier, promise(noise=1.5, clip=2.0))
    built.optimizer.optimizer.register_step_pre_hook(keep)
    before = [parameter.detach().clone() for parameter in built.model.parameters()]
    for step in range(2):
        built.private.privacy.step = step
        assert built.step(1.0).applied
    assert all(not torch.equal(old, new) for old, new in zip(before, built.model.parameters(), strict=True))
    first, second = seen
    deviation = 1.5 * 2.0 / 6
    assert float(first.std()) == pytest.approx(deviation, rel=5 / math.sqrt(2 * len(first)))
    assert abs(float(torch.corrcoef(torch.stack(seen))[0, 1])) < 5 / math.sqrt(len(first))
    assert not torch.equal(first, second)


def test_noise_follows_from_the_gradient_too() -> None:
    """Steps done again from the same state are the same; with anything changed, other noise: a difference of two
    outcomes would else be a gradient without noise."""
    privacy = promise(noise=1.0, clip=1.0)
    sums = [torch.ones(3, 2), torch.zeros(5)]
    again, changed = privacy.noise([x.clone() for x in sums]), privacy.noise([sums[0], sums[1] + 1e-6])
    assert all(torch.equal(one, other) for one, other in zip(privacy.noise(sums), again, strict=True))
    assert all(not torch.equal(one, other) for one, other in zip(again, changed, strict=True))
    privacy.step = 1
    assert not torch.equal(privacy.noise(sums)[0], again[0])


class Lookup(nn.Module):
    """A position table that the whole batch looks up once, which is not one of our models: Opacus takes each position
    for an example."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.table = nn.Embedding(64, 8), nn.Embedding(16, 8)
        self.head = nn.Linear(8, LABELS)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head((self.embedding(tokens) + self.table(torch.arange(tokens.size(1)))).mean(1))


class Borrowed(Lookup):
    """The token table is used once more, outside of its layer, where Opacus does not listen."""

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).mean(1) @ self.embedding.weight.T @ self.embedding.weight)


class BatchNormed(nn.Module):
    """An example's gradient depends on who else is in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(64, 8), nn.BatchNorm1d(8), nn.Linear(8, LABELS)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(tokens).mean(1)))


@pytest.mark.parametrize(
    ("build", "loss", "said"),
    [
        (lambda: decoder(lora=False), answer, "cannot take this model's gradients apart"),
        (Borrowed, classify, "embedding.weight has other gradients per example"),
        (Lookup, classify, "table.weight is not looked at by each example for itself"),
        (BatchNormed, classify, "cannot take this model's gradients apart"),
    ],
)
def test_gradients_that_are_not_an_examples_own_are_refused(
    build: Callable[[], nn.Module], loss: Callable[..., LossSums], said: str
) -> None:
    with pytest.raises(BigtrainError, match=said):
        engine(build, promise()).forward_backward(loss, batch(), 1.0, True)


def test_one_example_proves_nothing() -> None:
    built = engine(classifier, promise())
    assert isinstance(built, PrivateEngine)
    built.forward_backward(classify, batch(1), 1.0, True)
    assert not built.checked
    built.forward_backward(classify, batch(2), 1.0, True)
    assert built.checked


def test_the_check_leaves_nothing_behind() -> None:
    built = engine(lambda: classifier(dropout=0.3), promise())
    before = torch.get_rng_state()
    modes = [module.training for module in built.model.modules()]
    torch.manual_seed(3)
    built.forward_backward(classify, batch(), 1.0, True)
    first = [parameter.summed_grad.clone() for parameter in built.model.parameters()]
    built.discard()
    torch.manual_seed(3)  # a second time without the check: the same dropout, the same gradients
    built.forward_backward(classify, batch(), 1.0, True)
    assert all(torch.equal(old, p.summed_grad) for old, p in zip(first, built.model.parameters(), strict=True))
    assert [module.training for module in built.model.modules()] == modes
    torch.set_rng_state(before)
