"""Cutting is masking, nothing is lost where nothing was said, and transformers reads what is left."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain import models
from bigtrain.batch import LossSums
from bigtrain.checkpoint.weights import write_weights
from bigtrain.config import DecoderConfig, EncoderConfig, HuggingFaceConfig, Seq2SeqConfig
from bigtrain.errors import ConfigError
from bigtrain.models import huggingface
from bigtrain.models.heads import ClassificationHead, MaskedLMHead
from bigtrain.post_training import structure
from bigtrain.post_training.structure import Cut, choose, importances, shrink, silence
from bigtrain.tasks.labelled import WithHead

GPT = DecoderConfig(dim=32, n_layers=3, n_heads=4, vocab_size=64, max_seq_len=16, ffn_dim=48)
LLAMA = replace(
    GPT, n_kv_heads=2, positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False
)
BERT = EncoderConfig(dim=32, n_layers=3, n_heads=4, vocab_size=64, max_seq_len=16, dropout=0.0)
MODERN = replace(BERT, norm_first=True, positions="rotary", activation="geglu", norm="rmsnorm", token_types=0)
TOKENS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))


def make(config: Any) -> Any:
    """With weights that are not small, so that every part says something."""
    torch.manual_seed(0)
    model: Any = models.build(config)
    if isinstance(config, EncoderConfig):
        model = WithHead(model, ClassificationHead(config, 3, 0.0), pooled=True)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def loss(model: Any, batch: Any) -> LossSums:
    found = model(batch["tokens"]).logsumexp(-1).sum()
    return LossSums(found, found.detach())


def cut(model: Any, kept: Any) -> Any:
    """The smaller model, rebuilt from its config and tensors."""
    config = getattr(model, "backbone", model).config
    smaller, tensors = shrink(config, kept, ((name, p.detach()) for name, p in model.named_parameters()))
    built: Any = models.build(smaller)
    if isinstance(smaller, EncoderConfig):
        built = WithHead(built, ClassificationHead(smaller, 3, 0.0), pooled=True)
    given = dict(tensors)
    assert set(given) == {name for name, _ in built.named_parameters()}
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.copy_(given[name])
    return built.eval()


@pytest.mark.parametrize("by", structure.IMPORTANCES)
@pytest.mark.parametrize(
    ("config", "how"),
    [
        (GPT, Cut(heads=0.25, neurons=0.5)),
        (GPT, Cut(heads=2, layers=1)),
        (LLAMA, Cut(heads=0.5, neurons=10, layers=1, dim=8)),
        (LLAMA, Cut(dim=0.25)),
        (BERT, Cut(heads=0.25, neurons=0.5)),
        (MODERN, Cut(heads=1, neurons=0.5, layers=2, dim=0.5)),
        (replace(BERT, norm_first=True), Cut(heads=1, neurons=0.5, layers=2)),
    ],
)
def test_cutting_is_masking(config: Any, how: Cut, by: Any) -> None:
    model = make(config)
    found = importances(model, by, [{"tokens": TOKENS}], loss)
    kept = choose(config, how, found)
    masked = copy.deepcopy(model)
    silence(masked, kept)
    smaller = cut(model, kept)
    with torch.no_grad():
        torch.testing.assert_close(smaller(TOKENS), masked(TOKENS), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(masked(TOKENS), model(TOKENS), atol=1e-3)  # it did say something
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", [GPT, LLAMA, BERT])
def test_what_says_nothing_goes_and_nothing_changes(config: Any) -> None:
    model = make(config)
    inner = getattr(model, "backbone", model)
    size, rows = inner.blocks[0].attention.head_dim, 32 // (config.n_heads // structure.units(config))
    with torch.no_grad():
        for index, block in enumerate(inner.blocks):
            at = (
                index
                % structure.units(config)
                * (rows // structure.units(config))
                * (config.n_heads // structure.units(config))
            )
            width = size * (config.n_heads // structure.units(config))
            block.attention.out.weight[:, at : at + width] = 0
            block.feed_forward.down.weight[:, index::4] = 0
        if not isinstance(config, EncoderConfig):  # a layer of a post-norm encoder normalises all the same
            for matrix in (inner.blocks[1].attention.out, inner.blocks[1].feed_forward.down):
                matrix.weight.zero_()
                if matrix.bias is not None:
                    matrix.bias.zero_()
    found = importances(model, "activation", [{"tokens": TOKENS}], loss)
    how = Cut(heads=1, neurons=0.25, layers=0 if isinstance(config, EncoderConfig) else 1)
    smaller = cut(model, choose(config, how, found))
    with torch.no_grad():
        torch.testing.assert_close(smaller(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-5)


def test_taylor_is_what_the_loss_would_lose() -> None:
    """To first order: of a part that is nearly nothing, its importance is the change of the loss without it."""
    model = make(GPT).double()
    with torch.no_grad():
        model.blocks[1].feed_forward.down.weight[:, 7] *= 1e-3
    found = importances(model, "taylor", [{"tokens": TOKENS}], loss)
    before = float(loss(model, {"tokens": TOKENS}).nll)
    with torch.no_grad():
        model.blocks[1].feed_forward.down.weight[:, 7] = 0
    after = float(loss(model, {"tokens": TOKENS}).nll)
    assert float(found.neurons[1][7]) == pytest.approx(abs(after - before), rel=0.02)


@pytest.mark.parametrize(
    ("config", "architecture", "how"),
    [
        (GPT, "causal_lm", Cut(heads=0.25, neurons=0.5, layers=1)),
        (replace(GPT, tie_embeddings=False), "causal_lm", Cut(heads=2, dim=8)),
        (LLAMA, "causal_lm", Cut(heads=0.5, neurons=0.5, layers=1, dim=12)),
        (BERT, "masked_lm", Cut(heads=1, neurons=0.3, layers=1)),
    ],
)
def test_transformers_gives_the_same_logits(config: Any, architecture: str, how: Cut, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    model: Any = models.build(replace(config, pooler=False) if config is BERT else config)
    if config is BERT:
        model = WithHead(model, MaskedLMHead(config, model.embedding), pooled=False)
    found = importances(model, "magnitude")
    kept = choose(config, how, found)
    smaller, tensors = shrink(config, kept, ((n, p.detach()) for n, p in model.named_parameters()))
    weights = dict(tensors)
    built: Any = models.build(replace(smaller, pooler=False) if config is BERT else smaller)  # type: ignore[call-arg]
    if config is BERT:
        built = WithHead(built, MaskedLMHead(smaller, built.embedding), pooled=False)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.copy_(weights[name])
    settings, theirs = huggingface.to_huggingface(smaller, weights.items(), architecture)
    write_weights(tmp_path, theirs)
    import json

    (tmp_path / "config.json").write_text(json.dumps(settings))
    auto = transformers.AutoModelForMaskedLM if config is BERT else transformers.AutoModelForCausalLM
    loaded, problems = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not problems["missing_keys"]
    assert not problems["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(TOKENS).logits, built.eval()(TOKENS), rtol=1e-4, atol=1e-5)
    again = huggingface.read_config(tmp_path)
    if config is LLAMA:  # the only one of them whose heads have a size of their own
        assert (again.head_dim, again.n_heads) == (8, 2)


def test_a_width_that_no_whole_heads_fill_is_refused_by_bert() -> None:
    model = make(BERT)
    kept = choose(BERT, Cut(dim=3), importances(model, "magnitude"))
    smaller, tensors = shrink(BERT, kept, ((n, p.detach()) for n, p in model.named_parameters()))
    with pytest.raises(ConfigError, match=r"model\.head_dim=8: transformers' BERT has dim / n_heads"):
        huggingface.to_huggingface(smaller, tensors, "classification")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Cut(heads=4), "heads='4': there are 4, and one must stay; take at most 3"),
        (Cut(neurons=500), "neurons='500': there are 48"),
        (Cut(layers=3), "layers='3': there are 3"),
        (Cut(heads=0.1), "heads='0.1': of 4 that is none; take at least 0.25"),
        (Cut(layers=1.5), "layers='1.5': a fraction below 1, or a whole number"),
        (Cut(dim=-1), "dim='-1': a fraction"),
    ],
)
def test_more_than_there_is(how: Cut, message: str) -> None:
    found = importances(make(GPT), "magnitude")
    with pytest.raises(ConfigError) as caught:
        choose(GPT, how, found)
    assert message in str(caught.value)


@pytest.mark.parametrize("config", [HuggingFaceConfig(), Seq2SeqConfig()])
def test_what_is_not_ours_to_cut(config: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.kind="):
        structure.supported(config)


def test_data_are_needed_to_see_what_matters() -> None:
    with pytest.raises(ConfigError, match="is measured on data"):
        importances(make(GPT), "taylor")
