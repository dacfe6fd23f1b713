"""Architectures that are not ours, in transformers' code: the same numbers as theirs, from and to their directories."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from bigtrain.checkpoint.transfer import load_initial
from bigtrain.config import HuggingFaceConfig
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.models.huggingface import auto

SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN = SIZES | {"intermediate_size": 48, "num_key_value_heads": 1, "max_position_embeddings": 64}
NEOX = SIZES | {"intermediate_size": 48, "max_position_embeddings": 64}
ROBERTA = SIZES | {"intermediate_size": 48, "max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1}
DISTIL = {"vocab_size": 97, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 64}
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "pad_token_id": 0}
BART = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = torch.randint(5, 97, (2, 16), generator=torch.Generator().manual_seed(1))
MASK = torch.ones(2, 16, dtype=torch.long)
MASK[1, 11:] = 0
TARGETS = TOKENS.masked_fill(torch.arange(16) % 3 == 0, -100)


def directory(path: Path, name: str, config: str, values: dict[str, Any]) -> tuple[Any, Path]:
    """A random model of theirs, and where it is saved, in several files."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path, max_shard_size="20KB")
    return model, path


def loaded(model: auto.TransformersModel, path: Path) -> Any:
    report = load_initial(model, str(path))
    assert not report.new
    return model.eval()


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "config", "values"),
    [
        ("Qwen2ForCausalLM", "Qwen2Config", QWEN | {"tie_word_embeddings": True}),
        ("GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX),
    ],
)
def test_causal(name: str, config: str, values: dict[str, Any], tmp_path: Path) -> None:
    theirs, path = directory(tmp_path, name, config, values)
    found = auto.read_config(path, "causal_lm")
    assert (found.vocab_size, found.dim, found.max_seq_len) == (97, 32, 64)
    ours = loaded(auto.CausalLM(found), path)
    same(ours(TOKENS), theirs(TOKENS).logits)
    loss, nll = ours(TOKENS, TARGETS)
    expected = F.cross_entropy(theirs(TOKENS).logits.flatten(0, 1), TARGETS.flatten(), reduction="sum")
    same(loss, expected)
    same(nll, expected)
    shifted = theirs(TOKENS, labels=TOKENS).loss * (TOKENS.numel() - len(TOKENS))
    next_tokens = torch.cat((TOKENS[:, 1:], torch.full((2, 1), -100)), dim=1)
    same(ours(TOKENS, next_tokens)[0], shifted)
    smoothed, plain = ours(TOKENS, TARGETS, label_smoothing=0.1, z_loss=1e-2)
    rows = theirs(TOKENS).logits[TARGETS != -100]
    extra = 1e-2 * rows.logsumexp(-1).square().sum()
    same(smoothed, extra + F.cross_entropy(rows, TARGETS[TARGETS != -100], label_smoothing=0.1, reduction="sum"))
    same(plain, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
@pytest.mark.parametrize("task", ["masked_lm", "classification", "tagging", "question_answering"])
def test_encoders(kind: str, task: str, tmp_path: Path) -> None:
    family, config, values = {"roberta": ("Roberta", "RobertaConfig", ROBERTA),
                              "distilbert": ("DistilBert", "DistilBertConfig", DISTIL)}[kind]  # fmt: skip
    head = {"masked_lm": "MaskedLM", "classification": "SequenceClassification", "tagging": "TokenClassification",
            "question_answering": "QuestionAnswering"}[task]  # fmt: skip
    labels = 2 if task == "question_answering" else 3
    theirs, path = directory(tmp_path, f"{family}For{head}", config, values | {"num_labels": labels})
    found = auto.read_config(path, task)
    assert found.max_seq_len == 64  # RoBERTa's first two positions are none
    types = torch.ones_like(TOKENS)  # which neither has
    expected = theirs(input_ids=TOKENS, attention_mask=MASK)
    if task == "masked_lm":
        ours = loaded(auto.MaskedLM(found), path)
        same(ours(TOKENS, MASK, types)[0], expected.logits)
        wanted = F.cross_entropy(expected.logits.flatten(0, 1), TARGETS.flatten(), reduction="sum")
        same(ours(TOKENS, MASK, types, TARGETS)[0][0], wanted)
        same(ours(TOKENS, MASK, types, TARGETS, predict=True)[0], expected.logits[TARGETS != -100])
        return
    ours = loaded(auto.Classifier(found, task, labels, pad_id=1), path)
    logits = ours(TOKENS, MASK, types)
    if task == "question_answering":
        same(logits, torch.stack((expected.start_logits, expected.end_logits), dim=-1))
    else:
        same(logits, expected.logits)
    same(ours(TOKENS, MASK, types, change=torch.zeros(2, 16, 32)), logits)
    change = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(2))
    assert not torch.allclose(ours(TOKENS, MASK, types, change=change), logits)


@torch.no_grad()
def test_a_decoder_that_classifies_reads_the_last_token_before_padding(tmp_path: Path) -> None:
    theirs, path = directory(tmp_path, "Qwen2ForSequenceClassification", "Qwen2Config", QWEN | {"num_labels": 3})
    ours = loaded(auto.Classifier(auto.read_config(path, "classification"), "classification", 3, pad_id=4), path)
    padded = TOKENS.masked_fill(MASK == 0, 4)
    logits = ours(padded, MASK)
    theirs.config.pad_token_id = 4
    same(logits[1:], theirs(TOKENS[1:, :11]).logits)
    same(logits, theirs(padded, attention_mask=MASK).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders(kind: str, tmp_path: Path) -> None:
    name, config, values = {"t5": ("T5ForConditionalGeneration", "T5Config", T5 | {"decoder_start_token_id": 0}),
                            "bart": ("BartForConditionalGeneration", "BartConfig", BART)}[kind]  # fmt: skip
    theirs, path = directory(tmp_path, name, config, values)
    found = auto.read_config(path, "translation")
    assert found.architecture["decoder_start_token_id"] == {"t5": 0, "bart": 2}[kind]
    ours = loaded(auto.Seq2Seq(found), path)
    expected = theirs(input_ids=TOKENS, attention_mask=MASK, decoder_input_ids=TOKENS).logits
    same(ours(TOKENS, MASK, TOKENS), expected)
    memory = ours(TOKENS, MASK)
    same(ours(None, MASK, TOKENS, memory=memory), expected)
    wanted = F.cross_entropy(expected.flatten(0, 1), TARGETS.flatten(), reduction="sum")
    same(ours(TOKENS, MASK, TOKENS, TARGETS)[0], wanted)

    from bigtrain.models.generation import translate

    marks = {"cls": found.architecture["decoder_start_token_id"], "sep": 3, "pad": 0}
    options = {"do_sample": False, "num_beams": 2}
    rows = translate(ours, ours.n_decoder_layers, memory, MASK, marks, 97, 12, options)
    settings = transformers.GenerationConfig(
        decoder_start_token_id=marks["cls"], eos_token_id=3, pad_token_id=0, max_new_tokens=12, **options
    )
    written = theirs.generate(TOKENS, attention_mask=MASK, generation_config=settings)[:, 1:].tolist()
    assert rows == [row[: row.index(3)] if 3 in row else row for row in written]


@torch.no_grad()
def test_a_base_model_gets_a_new_head_and_older_names_are_known(tmp_path: Path) -> None:
    theirs, path = directory(tmp_path, "RobertaModel", "RobertaConfig", ROBERTA)
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name.replace("LayerNorm.weight", "LayerNorm.gamma"): t for name, t in tensors.items()}, file)
    index = path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("LayerNorm.weight", "LayerNorm.gamma"))
    model = auto.Classifier(auto.read_config(path, "classification"), "classification", 3, pad_id=1)
    report = load_initial(model, str(path))
    assert {name.rsplit(".", 2)[-2] for name in report.new} == {"dense", "out_proj"}
    hidden = model.eval().model.roberta(input_ids=TOKENS, attention_mask=MASK).last_hidden_state
    same(hidden, theirs(input_ids=TOKENS, attention_mask=MASK).last_hidden_state)


def test_random_weights_are_drawn_as_theirs(tmp_path: Path) -> None:
    values = QWEN | {"initializer_range": 0.3, "hidden_size": 64}
    _, path = directory(tmp_path, "Qwen2ForCausalLM", "Qwen2Config", values)
    model = auto.CausalLM(auto.read_config(path, "causal_lm", pretrained=False)).model
    assert 0.28 < model.model.embed_tokens.weight.std().item() < 0.32
    assert 0.27 < model.model.layers[0].mlp.up_proj.weight.std().item() < 0.33
    assert torch.equal(model.model.norm.weight, torch.ones(64))
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    t5.save_pretrained(tmp_path / "t5")
    drawn = auto.Seq2Seq(auto.read_config(tmp_path / "t5", "translation", pretrained=False)).model
    for (name, ours), (_, theirs) in zip(drawn.named_parameters(), t5.named_parameters(), strict=True):
        assert abs(ours.std().item() - theirs.std().item()) < 0.5 * theirs.std().item() + 1e-6, name


def test_a_cast_keeps_the_rotary_frequencies(tmp_path: Path) -> None:
    _, path = directory(tmp_path, "Qwen2ForCausalLM", "Qwen2Config", QWEN)
    model = auto.CausalLM(auto.read_config(path, "causal_lm"))
    before = model.model.model.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16).to_empty(device="cpu")
    assert model.model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.model.model.rotary_emb.inv_freq, before)


def test_activation_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    _, path = directory(tmp_path, "GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX | {"use_cache": True})
    model = loaded(auto.CausalLM(auto.read_config(path, "causal_lm")), path).train()
    gradients = []
    for enabled in (False, True):
        model.set_activation_checkpointing(enabled)
        model.zero_grad()
        model(TOKENS, TARGETS)[0].backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for name, gradient in gradients[0].items():
        same(gradients[1][name], gradient)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("values", "task", "said"),
    [
        ({"model_type": "qwen99"}, "causal_lm", "its model_type is qwen99, which transformers .* has no class for"),
        ({"model_type": "qwen99", "auto_map": {"AutoModel": "m.M"}}, "causal_lm", "never run"),
        ({"model_type": "distilbert"}, "translation", "distilbert, of which transformers has no ModelForSeq2SeqLM"),
        ({"model_type": "qwen2", "hidden_size": "wide"}, "causal_lm", "its config.json is no qwen2's"),
        ({"model_type": "qwen2", "quantization_config": {}}, "causal_lm", "its weights are quantized"),
    ],
)
def test_what_cannot_be_had(values: dict[str, Any], task: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=said) as caught:
        auto.read_config(tmp_path, task)
    assert str(caught.value).startswith(f"model.path='{tmp_path}': ")
    assert "\n" not in str(caught.value)


def test_pickled_or_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        auto.read_config(tmp_path, "causal_lm")
    _, path = directory(tmp_path, "GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX)
    found = auto.read_config(path, "causal_lm")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["gpt_neox.layers.1.attention.dense.weight"]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BigtrainError, match=r"has no weight gpt_neox\.layers\.1\.attention\.dense\.weight, which GPTN"):
        load_initial(auto.CausalLM(found), str(path))
    for file in path.glob("*.safetensors*"):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"only pickled weights there \(pytorch_model\.bin\)"):
        auto.read_config(path, "causal_lm")
    assert dataclasses.replace(found, pretrained=False) == auto.read_config(path, "causal_lm", pretrained=False)
    assert isinstance(found, HuggingFaceConfig)
