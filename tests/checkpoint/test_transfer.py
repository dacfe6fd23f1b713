"""Weights that fit are all used; those that do not stop the run or are named: nothing begins anew in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bigtrain.checkpoint.integrity import seal
from bigtrain.checkpoint.transfer import RECORD, described, load_initial, record
from bigtrain.checkpoint.weights import write_weights
from bigtrain.config import EncoderConfig
from bigtrain.errors import BigtrainError
from bigtrain.launch.pretrained import _check_tokens
from bigtrain.models import build
from bigtrain.models.huggingface import auto, read_config
from tests.models.test_huggingface import BERT, LLAMA, WithHeads, theirs

Tensors = dict[str, Tensor]
Q, OUT = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qo")
HEAD, WORDS, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
KINDS = pytest.mark.parametrize("kind", ["ours", "transformers"])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    theirs("LlamaForCausalLM", "LlamaConfig", LLAMA).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    theirs("BertForPreTraining", "BertConfig", BERT).save_pretrained(path)
    return path


def changed(source: Path, to: Path, change: Callable[[Tensors], Any], **settings: Any) -> Path:
    """A copy of a directory with other tensors or another config.json."""
    shutil.copytree(source, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, to / "model.safetensors")
    values = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(values | settings))
    return to


def decoder(path: Path, kind: str) -> nn.Module:
    """Of the directory, on the meta device as before the start."""
    with torch.device("meta"):
        return build(read_config(path)) if kind == "ours" else auto.CausalLM(auto.read_config(path, "causal_lm"))


def classifier(path: Path, kind: str) -> nn.Module:
    """Of three labels."""
    if kind != "ours":
        return auto.Classifier(auto.read_config(path, "classification"), "classification", 3, pad_id=0)
    config = read_config(path)
    assert isinstance(config, EncoderConfig)
    return WithHeads(replace(config, pooler=True), "classification")


def nothing(tensors: Tensors) -> None: ...


def rows(tensors: Tensors) -> None:
    for name in (HEAD, WORDS):
        tensors[name] = torch.cat((tensors[name], tensors[name][:31]))


def one_more_layer(tensors: Tensors) -> None:
    tensors |= {k.replace("layers.1.", "layers.2."): t for k, t in tensors.items() if "layers.1." in k}


def gptq(tensors: Tensors) -> None:
    tensors[Q.replace("weight", "qweight")] = tensors.pop(Q).to(torch.int32)


def of_ddp(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[f"module.{name}"] = tensors.pop(name)


def cast(dtype: torch.dtype) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({Q: tensors[Q].to(dtype)})


def more(name: str, *shape: int) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: torch.ones(*shape)})


# name -> (what is done to the tensors, what is written into config.json, what is said)
SPOILED: dict[str, tuple[Callable[[Tensors], Any], dict[str, Any], str]] = {
    "more rows": (rows, {}, r"\(128, 64\) there, \(97, 64\) in this model"),
    "narrow": (more(NORM, 63), {}, r"norm\.weight is \(63,\) there"),
    "misshapen": (more(OUT, 64, 63), {}, r"\(64, 63\) there"),
    "a layer less": (nothing, {"num_hidden_layers": 3}, r"has no weight \S*layers\.2\."),
    "a layer more": (one_more_layer, {}, r"holds model\.layers\.2\.\S+, which no "),
    "a layer less in config.json": (nothing, {"num_hidden_layers": 1}, r"holds model\.layers\.1\.\S+, which no "),
    "no norm": (lambda tensors: tensors.pop(NORM), {}, r"has no weight \S*norm\.weight"),
    "no words": (lambda tensors: tensors.pop(WORDS), {}, r"has no weight \S*embed_tokens"),
    "no head": (lambda tensors: tensors.pop(HEAD), {}, r"has no weights? (for )?\S*lm_head"),
    "two though tied": (nothing, {"tie_word_embeddings": True}, "is another than its .*one by its config"),
    "int8": (cast(torch.int8), {}, f"{Q} is in I8: quantized"),
    "fp8": (cast(torch.float8_e4m3fn), {}, f"{Q} is in F8_E4M3: quantized"),
    "bitsandbytes": (more(f"{Q}.absmax", 4), {}, f"holds {Q}.absmax, which no "),
    "gptq": (gptq, {}, r"(holds|has no weight) \S*layers\.0\.self_attn\.q_proj\.q?weight"),
    "lora": (more(Q.replace("weight", "lora_A.weight"), 2, 64), {}, "holds .*lora_A.weight, which no "),
    "bias": (more(Q.replace("weight", "bias"), 64), {}, "holds .*q_proj.bias, which no "),
    "ddp": (of_ddp, {}, "has no weight"),
}


@KINDS
@pytest.mark.parametrize("name", SPOILED)
def test_what_does_not_fit_stops(name: str, kind: str, llama: Path, tmp_path: Path) -> None:
    change, settings, said = SPOILED[name]
    path = changed(llama, tmp_path / "spoiled", change, **settings)
    with pytest.raises(BigtrainError, match=said) as caught:
        load_initial(decoder(path, kind), str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@KINDS
def test_what_fits_is_read_and_what_is_left_out_is_named(kind: str, llama: Path, tmp_path: Path) -> None:
    def extended(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["score.weight"] = torch.ones(1, 64)
        tensors[NORM] = tensors[NORM].double()

    path = changed(llama, tmp_path / "more", extended)
    report = load_initial(decoder(path, kind), str(path))
    assert [name.removeprefix("model.") for name in report.skipped] == ["score.weight"]
    assert not report.new
    assert "; 1 not used: " in described(report, "x")
    assert "score.weight (not in this model)" in described(report, "x")

    path = changed(llama, tmp_path / "tied", lambda t: t.update({HEAD: t[WORDS]}), tie_word_embeddings=True)
    assert not load_initial(decoder(path, kind), str(path)).skipped


@KINDS
def test_heads_and_poolers_may_be_new(kind: str, bert: Path, tmp_path: Path) -> None:
    report = load_initial(classifier(bert, kind), str(bert))
    assert len(report.new) == 2
    assert all("classifier" in name or "head.linear" in name for name in report.new)
    assert len(report.skipped) == 7, "the heads for words and pairs"
    assert f"and 1 more ({RECORD})" in described(report, str(bert))
    assert record(report, "there")["new"] == report.new
    with pytest.raises(BigtrainError, match=r"has no weights for .*, which this model needs"):
        load_initial(classifier(bert, kind), str(bert), new_heads=False)

    def no_pooler(tensors: Tensors) -> None:
        for name in [name for name in tensors if "pooler" in name]:
            del tensors[name]

    path = changed(bert, tmp_path / "no pooler", no_pooler)
    assert len(load_initial(classifier(path, kind), str(path)).new) == 4

    def two_labels(tensors: Tensors) -> None:
        tensors |= {"classifier.weight": torch.ones(2, 64), "classifier.bias": torch.ones(2)}

    path = changed(bert, tmp_path / "two", two_labels)
    report = load_initial(classifier(path, kind), str(path))
    assert len(report.new) == sum("in this model" in why and "there" in why for why in report.skipped.values()) == 2

    path = changed(bert, tmp_path / "half", more("classifier.weight", 3, 64))
    with pytest.raises(BigtrainError, match="though it has others of that head"):
        load_initial(classifier(path, kind), str(path))


@KINDS
def test_two_tables_of_words_that_differ(kind: str, bert: Path, tmp_path: Path) -> None:
    path = changed(bert, tmp_path / "two", more("cls.predictions.decoder.weight", 97, 64))
    with pytest.raises(BigtrainError, match=r"is another than its .*one by its config"):
        read_config(path) if kind == "ours" else auto.read_config(path, "masked_lm")


def test_a_learned_buffer_is_not_lost(tmp_path: Path) -> None:
    """Marian's bias of the logits is none of its parameters."""
    sizes = {f"{name}_{what}": size for name in ("encoder", "decoder") for what, size in
             (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    config = transformers.MarianConfig(
        vocab_size=31, d_model=16, max_position_embeddings=8, pad_token_id=0, decoder_start_token_id=0, **sizes
    )
    model = transformers.MarianMTModel(config)
    model.save_pretrained(tmp_path)
    auto.read_config(tmp_path, "translation")
    model.final_logits_bias += 1
    model.save_pretrained(tmp_path)
    with pytest.raises(BigtrainError, match="holds final_logits_bias, which was learned but is no parameter"):
        auto.read_config(tmp_path, "translation")


def test_an_earlier_run_of_another_model(tmp_path: Path) -> None:
    """An encoder of fewer words, positions or layers than its checkpoint; another head is another task's."""
    config = EncoderConfig(dim=32, n_layers=1, n_heads=2, vocab_size=97, max_seq_len=32)
    saved = tmp_path / "checkpoints" / "step-00000001"
    saved.mkdir(parents=True)
    model = WithHeads(config, "classification")
    write_weights(saved, ((name, weight.detach()) for name, weight in model.named_parameters()))
    seal(saved, {"step": 1})
    assert not load_initial(WithHeads(config, "classification"), str(tmp_path)).new
    report = load_initial(WithHeads(config, "tagging", labels=2), str(tmp_path))
    assert sorted(report.new) == ["head.linear.bias", "head.linear.weight"]
    for other in (replace(config, max_seq_len=16), replace(config, vocab_size=98), replace(config, n_layers=2)):
        with pytest.raises(BigtrainError, match=r"which this model needs|there, .* in this model"):
            load_initial(WithHeads(other, "classification"), str(tmp_path))


def test_tokens_must_be_those_of_the_weights(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    def tokenizer(name: str, words: list[str]) -> str:
        (tmp_path / name).mkdir()
        found = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
        found.save(str(tmp_path / name / "tokenizer.json"))
        return str(tmp_path / name)

    words = [f"w{number}" for number in range(100)]
    source = tokenizer("source", words)
    assert _check_tokens(str(tmp_path), source) is None, "a directory without a tokenizer"
    assert _check_tokens(source, tokenizer("more", [*words, "new"])) is None
    assert _check_tokens(source, tokenizer("fewer", words[:50])) is None
    line = _check_tokens(source, tokenizer("renamed", [*words[:99], "<user>"]))
    assert line is not None
    assert line.startswith("1 tokens have other names")
    with pytest.raises(BigtrainError, match=r"of other tokens: 0 is 'w0' there and 'w99' in the data, and 100 of 100"):
        _check_tokens(source, tokenizer("reversed", words[::-1]))
