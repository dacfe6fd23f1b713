"""The encoder and its heads: BERT as transformers has it, the modern variant, masks, packing, loss."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.config import EncoderConfig
from bigtrain.models import Encoder, build, count_parameters, flops_per_token
from bigtrain.models import unpadded as unpadded_module
from bigtrain.models.heads import ClassificationHead, MaskedLMHead, PairHead, TaggingHead
from tests.distributed.ranks import run_ranks

BERT = EncoderConfig(dim=64, n_layers=2, n_heads=4, vocab_size=97, max_seq_len=32, init_std=0.1)
MODERN = EncoderConfig(
    dim=64, n_layers=2, n_heads=4, ffn_dim=96, vocab_size=97, max_seq_len=32, positions="rotary", token_types=0,
    norm="rmsnorm", norm_eps=1e-5, norm_first=True, activation="geglu", bias=False, pooler=False, dropout=0.0,
    init_std=0.1,
)  # fmt: skip
BOTH = pytest.mark.parametrize("config", [BERT, MODERN], ids=["bert", "modern"])


def make(config: EncoderConfig, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return build(config)


def some_tokens(batch: int = 2, length: int = 16) -> Tensor:
    return torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(1))


def test_the_modern_variant_is_modernbert_with_full_attention() -> None:
    from transformers import ModernBertConfig, ModernBertModel

    config = dataclasses.replace(MODERN, norm="layernorm")
    theirs = ModernBertModel(
        ModernBertConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=97,
            layer_types=["full_attention"] * 2, attn_implementation="sdpa", pad_token_id=0, max_position_embeddings=32,
            rope_parameters={
                kind: {"rope_type": "default", "rope_theta": 10_000.0}
                for kind in ("full_attention", "sliding_attention")
            },
        )
    ).eval()  # fmt: skip
    ours = make(config).eval()
    with torch.no_grad():
        theirs.embeddings.tok_embeddings.weight.copy_(ours.embedding.weight)
        theirs.embeddings.norm.weight.copy_(ours.embedding_norm.weight)
        for mine, other in zip(ours.blocks, theirs.layers, strict=True):
            other.attn.Wqkv.weight.copy_(mine.attention.qkv.weight)
            other.attn.Wo.weight.copy_(mine.attention.out.weight)
            other.mlp.Wi.weight.copy_(mine.feed_forward.up.weight)
            other.mlp.Wo.weight.copy_(mine.feed_forward.down.weight)
        tokens, mask = some_tokens(), torch.ones(2, 16, dtype=torch.long)
        mask[1, 9:] = 0
        expected = theirs(tokens, attention_mask=mask).last_hidden_state
        found = ours(tokens, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in theirs.parameters()) == count_parameters(config)


@BOTH
def test_padding_changes_nothing(config: EncoderConfig) -> None:
    model = make(config).eval()
    tokens = some_tokens(3)
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[1, 10:] = 0
    mask[2] = 0  # a filler row without any token
    with torch.no_grad():
        whole = model(tokens, mask)
        alone = model(tokens[1:2, :10])
        assert torch.equal(model(tokens, torch.ones_like(tokens)), model(tokens))
        other = tokens.clone()
        other[1, 10:] = 5
        changed = model(other, mask)
    torch.testing.assert_close(whole[1:2, :10], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole[1, :10], changed[1, :10], rtol=1e-5, atol=1e-5)
    assert whole.isfinite().all()


@BOTH
def test_packed_documents_do_not_see_each_other(config: EncoderConfig) -> None:
    model = make(config).eval()
    tokens = some_tokens(1)
    documents = torch.tensor([[0] * 6 + [1] * 7 + [2] * 3])
    positions = torch.cat([torch.arange(6), torch.arange(7), torch.arange(3)])[None]
    mask = torch.tensor([[1] * 13 + [0] * 3])  # the last one is padding
    with torch.no_grad():
        packed = model(tokens, mask, positions=positions, document_ids=documents)
        first, second = model(tokens[:, :6]), model(tokens[:, 6:13])
    torch.testing.assert_close(packed[:, :13], torch.cat([first, second], dim=1), rtol=1e-5, atol=1e-5)
    assert packed.isfinite().all()


UNPADDED = {
    "bert": BERT,
    "modern": MODERN,
    "bert-rotary": dataclasses.replace(BERT, positions="rotary"),
    "modern-learned": dataclasses.replace(MODERN, positions="learned", token_types=2),
}


@pytest.mark.parametrize("config", UNPADDED.values(), ids=UNPADDED)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("multiple", "computed"), [(1, 30), (16, 32)])
def test_without_padding_hidden_states_and_gradients_are_the_same(
    config: EncoderConfig, checkpointing: bool, multiple: int, computed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpadded_module, "CPU_MULTIPLE", multiple)
    config = dataclasses.replace(config, dropout=0.0)
    tokens, mask = some_tokens(4), torch.ones(4, 16, dtype=torch.long)
    mask[0, 10:] = mask[1, 3:] = mask[2, 1:] = 0
    types = (torch.arange(16) > 5).long().expand(4, 16)
    change = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(3)) * mask.unsqueeze(-1)
    seen: list[int] = []

    def run(unpadded: bool) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        model = make(dataclasses.replace(config, unpadded=unpadded)).train()
        model.set_activation_checkpointing(checkpointing)
        model.blocks[1].feed_forward.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel() // 64))
        moved = change.clone().requires_grad_()
        hidden = model(tokens, mask, types, change=moved)
        (hidden * weight).sum().backward()
        assert moved.grad is not None
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return hidden.detach(), gradients, moved.grad

    (padded, wanted, wanted_change), (found, gradients, found_change) = run(False), run(True)
    assert set(seen) == {64, computed}, "the blocks have computed padding"
    real = mask.bool()
    torch.testing.assert_close(found[real], padded[real], rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(found_change, wanted_change, rtol=1e-4, atol=1e-5)


@BOTH
def test_without_padding_nothing_to_take_out_and_nothing_left(
    config: EncoderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpadded_module, "CPU_MULTIPLE", 1)
    plain, unpadded = (make(dataclasses.replace(config, unpadded=u)).eval() for u in (False, True))
    tokens, mask = some_tokens(3), torch.ones(3, 16, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(unpadded(tokens, mask), plain(tokens))
        mask[1, 5:] = mask[2] = 0  # a filler row without any token
        found = unpadded(tokens, mask)
        torch.testing.assert_close(found[:1], plain(tokens[:1]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1:2, :5], plain(tokens[1:2, :5]), rtol=1e-5, atol=1e-5)
    assert found.isfinite().all()


@pytest.mark.gpu
def test_without_padding_on_a_gpu() -> None:
    """In 16 bits flash attention takes texts of different lengths; in float32 they are padded within attention."""
    config = dataclasses.replace(MODERN, dim=128)
    tokens, mask = some_tokens(4).cuda(), torch.ones(4, 16, dtype=torch.long, device="cuda")
    mask[0, 10:] = mask[1, 3:] = 0
    for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        plain, unpadded = (
            make(dataclasses.replace(config, unpadded=u)).eval().to("cuda", dtype) for u in (False, True)
        )
        found, wanted = unpadded(tokens, mask), plain(tokens, mask)
        torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=close, atol=close)


def test_every_token_sees_later_ones_and_its_segment() -> None:
    model = make(BERT).eval()
    tokens = some_tokens(1)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % 97
    types = torch.zeros_like(tokens)
    with torch.no_grad():
        plain = model(tokens)
        assert not torch.allclose(plain[0, 0], model(other)[0, 0])
        assert torch.equal(plain, model(tokens, token_types=types))
        types[0, 8:] = 1
        assert not torch.allclose(plain[0, 0], model(tokens, token_types=types)[0, 0])


def test_pooling() -> None:
    bert, modern = make(BERT), make(MODERN)
    hidden = torch.randn(2, 5, 64)
    assert bert.pooler is not None
    expected = torch.tanh(hidden[:, 0] @ bert.pooler.weight.T + bert.pooler.bias)
    torch.testing.assert_close(bert.pool(hidden), expected)
    assert torch.equal(modern.pool(hidden), hidden[:, 0])


def test_the_mean_of_a_text_is_that_of_its_real_tokens() -> None:
    model = make(dataclasses.replace(MODERN, pooling="mean"))
    hidden = torch.randn(3, 5, 64)
    torch.testing.assert_close(model.pool(hidden), hidden.mean(1))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [0] * 5])  # the last one is filler
    expected = torch.stack((hidden[0, :3].mean(0), hidden[1].mean(0), torch.zeros(64)))
    torch.testing.assert_close(model.pool(hidden, mask), expected)

    bert = make(dataclasses.replace(BERT, pooling="mean"))
    assert bert.pooler is not None
    torch.testing.assert_close(bert.pool(hidden, mask), torch.tanh(expected @ bert.pooler.weight.T + bert.pooler.bias))


@BOTH
def test_meta_device_then_init_weights_gives_the_same_weights(config: EncoderConfig) -> None:
    with torch.device("meta"):
        late = build(config)
    late.to_empty(device="cpu")
    torch.manual_seed(0)
    late.init_weights()
    for (name, expected), found in zip(make(config).named_parameters(), late.parameters(), strict=True):
        if "norm" not in name:
            assert torch.equal(expected, found), name


@BOTH
def test_activation_checkpointing_changes_no_gradient(config: EncoderConfig) -> None:
    gradients = []
    for enabled in (False, True):
        model = make(config).train()
        model.set_activation_checkpointing(enabled)
        torch.manual_seed(2)
        model.pool(model(some_tokens())).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_flops_count_what_is_multiplied() -> None:
    d, t, layers = 64, 32, 2
    assert count_parameters(BERT) == (97 + 2 + 32) * d + 2 * d + layers * _block(BERT) + d * (d + 1)
    expected = 6 * (2 * d + layers * _block(BERT) + d * (d + 1) / t) + 12 * layers * d * t
    assert flops_per_token(BERT) == pytest.approx(expected)
    assert flops_per_token(MODERN) == pytest.approx(6 * (count_parameters(MODERN) - 97 * d) + 12 * layers * d * t)


def _block(config: EncoderConfig) -> int:
    return sum(p.numel() for p in make(config).blocks[0].parameters())


# --------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("config", [BERT, dataclasses.replace(MODERN, bias=False)], ids=["bert", "modern"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_loss_is_the_one_of_all_logits(config: EncoderConfig, smoothing: float) -> None:
    model = make(config).eval()
    head = MaskedLMHead(config, model.embedding)
    nn.init.normal_(head.bias)
    tokens = some_tokens()
    targets = torch.where(torch.arange(16) % 5 == 0, tokens, -100)
    both = nn.ModuleDict({"backbone": model, "head": head})

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        both.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in both.named_parameters() if p.grad is not None}

    logits = head(model(tokens))
    assert logits.shape == (2, 16, 97)
    expected = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=smoothing, ignore_index=-100
    )
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    wanted = gradients(expected)
    loss, nll = head(model(tokens), targets, smoothing)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(nll, plain.detach())
    found = gradients(loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_nothing_to_score_is_zero_and_still_uses_every_weight() -> None:
    model = make(BERT).eval()
    head = MaskedLMHead(BERT, model.embedding)
    loss, nll = head(model(some_tokens()), torch.full((2, 16), -100))
    loss.backward()
    assert loss.item() == nll.item() == 0.0
    for parameter in (*model.blocks.parameters(), *head.parameters()):
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_names_that_export_relies_on() -> None:
    model = make(BERT)
    head = MaskedLMHead(BERT, model.embedding)
    both = nn.ModuleDict({"backbone": model, "head": head})
    names = [name for name, _ in both.named_parameters() if name.startswith("head.")]
    assert names == ["head.bias", "head.dense.weight", "head.dense.bias", "head.norm.weight", "head.norm.bias"]
    assert [name for name, _ in PairHead(BERT).named_parameters()] == ["linear.weight", "linear.bias"]


@pytest.mark.parametrize("kind", [ClassificationHead, TaggingHead])
def test_label_heads(kind: Any) -> None:
    head = kind(BERT, labels=3, dropout=0.5)
    x = torch.randn(2, 64) if kind is ClassificationHead else torch.randn(2, 7, 64)
    assert head(x).shape == (*x.shape[:-1], 3)
    assert not torch.equal(head(x), head(x))
    head.eval()
    torch.testing.assert_close(head(x), x @ head.linear.weight.T + head.linear.bias)
    assert PairHead(BERT)(torch.randn(5, 64)).shape == (5, 2)


# ----------------------------------------------------------------------------------------------- under ZeRO-3


class Pretraining(nn.Module):
    """Encoder, tied head and pair head, as BERT's pretraining has them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = build(dataclasses.replace(BERT, dropout=0.0))
        self.head = MaskedLMHead(BERT, self.backbone.embedding)
        self.pair_head = PairHead(BERT)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = self.backbone(tokens)
        loss, _ = self.head(hidden, targets)
        return loss + self.pair_head(self.backbone.pool(hidden)).logsumexp(-1).sum()


def loss_of(model: nn.Module, rank: int) -> Tensor:
    """Rank 1's batch has nothing to score: it must go through the same weights nevertheless."""
    tokens = some_tokens()
    targets = torch.where(torch.arange(16) % 5 == 0, tokens, -100) if rank == 0 else torch.full_like(tokens, -100)
    loss: Tensor = model(tokens, targets)
    return loss


def run_rank(output: str) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an op for inference: it would be built, never used
    deepspeed.init_distributed("gloo", verbose=False)
    settings = {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    torch.manual_seed(int(os.environ["RANK"]))
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = Pretraining()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), config=settings
    )
    loss = loss_of(engine, int(os.environ["RANK"]))
    engine.backward(loss)
    gradients = {key: safe_get_full_grad(parameter) for key, parameter in model.named_parameters()}
    if int(os.environ["RANK"]) == 0:
        torch.save({"loss": loss.detach(), "gradients": gradients}, output)


def test_zero_3_gives_the_same_loss_and_gradients(tmp_path: Path) -> None:
    run_ranks(f"{__name__}:run_rank", 2, {"output": str(tmp_path / "result.pt")})
    result = torch.load(tmp_path / "result.pt")
    torch.manual_seed(0)
    plain = Pretraining()
    losses = [loss_of(plain, rank) for rank in range(2)]
    (sum(losses) / 2).backward()  # type: ignore[union-attr]  # DeepSpeed takes the mean over ranks
    torch.testing.assert_close(result["loss"], losses[0].detach(), rtol=1e-5, atol=0)
    expected = dict(plain.named_parameters())
    assert result["gradients"].keys() == expected.keys()
    for key, gradient in result["gradients"].items():
        torch.testing.assert_close(gradient, expected[key].grad, rtol=1e-4, atol=1e-5, msg=key)
