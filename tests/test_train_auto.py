"""`model=hf` from a directory to a directory: real ranks train it, then it is measured, asked and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bigtrain import evaluate, generate
from bigtrain.config import Config, from_dict, load, to_dict
from bigtrain.data.tokenizer import train_tokenizer
from bigtrain.errors import ConfigError
from bigtrain.export import export
from bigtrain.launch.train import checked
from tests.runs import bigtrain, losses, result

WORDS = ["red", "blue", "one", "two"]
COMMON = [
    "logger.progress=false",
    "schedule=constant",
    "train.precision=fp32",
    "train.global_batch=8",
    "launch.ranks=2",
    "optimizer.lr=3e-3",
]


def labelled(path: Path, kind: str) -> Path:
    """Colours and numbers told apart, or turned round."""
    rows = []
    for i in range(160):
        first, second = WORDS[i % 4], WORDS[(i // 4) % 4]
        text = f"{first} {second}"
        rows.append({"text": text, "label": "colour" if i % 4 < 2 else "number"} if kind == "label"
                    else {"source": text, "target": f"{second} {first}"})  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def directory(path: Path, name: str, config: str, values: dict[str, Any]) -> Path:
    """A tiny model with a tokenizer beside it."""
    tokenizer = train_tokenizer([" ".join(WORDS * 20)] * 20, 300, for_encoder=True)
    ids = {f"{name}_token_id": tokenizer.token_to_id(f"[{name.upper()}]") for name in ("pad", "cls", "sep")}
    values |= {"vocab_size": 320, "pad_token_id": ids["pad_token_id"], "eos_token_id": ids["sep_token_id"]}
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**values))
    model.save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


QWEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 48, "max_position_embeddings": 64, "tie_word_embeddings": True}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0}  # fmt: skip
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 32, "dropout": 0.0}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}


def test_a_causal_model_from_directory_to_directory(tmp_path: Path) -> None:
    """The same curve at ZeRO-2 and ZeRO-3, which fills sharded parameters; resumed, asked, exported."""
    path = directory(tmp_path / "qwen", "Qwen2ForCausalLM", "Qwen2Config", dict(QWEN))
    (path / "corpus.txt").write_text("\n".join(f"{WORDS[i % 4]} {WORDS[(i // 4) % 4]}" for i in range(4000)))
    common = [*COMMON, "model=hf", f"model.path={path}", "model.max_seq_len=32", "data=text",
              f"data.path={path}/corpus.txt", "data.held_out=0.2", f"data.cache_dir={tmp_path}/cache"]  # fmt: skip
    run = tmp_path / "zero3"
    said = bigtrain(
        "train", *common, f"run_dir={run}", "engine=zero3", "train.steps=4", "train.activation_checkpointing=true"
    )
    assert f"weights from {path}" in said
    bigtrain("train", *common, f"run_dir={tmp_path}/zero2", "engine=zero2", "train.steps=8")
    bigtrain("train", *common, f"run_dir={run}", "engine=zero3", "train.steps=8")
    two, three = losses(tmp_path / "zero2"), losses(run)
    assert two.keys() == three.keys() == set(range(1, 9))
    assert all(abs(two[step] - three[step]) < 1e-3 for step in two)
    assert two[8] < two[1] - 0.5

    metrics, _ = evaluate.run(run, data=[], columns={})
    assert metrics["eval/loss"] == pytest.approx(result(run)["eval/loss"], abs=1e-4)
    (text,) = generate.run(run, ["red"], max_new_tokens=8)
    limits = {"cpu": "30KB"}  # of 90: the rest is read from disk
    assert generate.run(run, ["red"], max_new_tokens=8, max_memory=limits) == [text]
    limited, _ = evaluate.run(run, data=[], columns={}, max_memory=limits, out=tmp_path / "limited")
    assert limited["eval/loss"] == pytest.approx(metrics["eval/loss"], abs=1e-6)

    out = export(run, tmp_path / "out")
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    batch = tokenizer(tokenizer.bos_token + "red", return_tensors="pt", add_special_tokens=False)
    written = theirs.generate(**batch, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(written[0], skip_special_tokens=True) == text

    again = checked(to_dict(load(run / "config.yaml")) | {
        "model": {"kind": "pretrained", "path": str(run), "max_seq_len": 16, "dropout": None}, "init_from": None
    })  # fmt: skip
    assert (again.model.kind, again.model.max_seq_len, again.init_from) == ("hf", 16, str(run))


def test_an_encoder_classifies(tmp_path: Path) -> None:
    path = directory(tmp_path / "distil", "DistilBertModel", "DistilBertConfig", dict(DISTIL))
    data = labelled(tmp_path / "a.jsonl", "label")
    run = tmp_path / "run"
    said = bigtrain("train", *COMMON, f"run_dir={run}", "task=classification", "model=hf", f"model.path={path}",
                    "data=labelled", f"data.path={data}", f"data.cache_dir={tmp_path}/cache", "engine=zero3",
                    "optimizer.lr=1e-2", "train.steps=60")  # fmt: skip
    assert "new: model.pre_classifier.weight" in said
    assert result(run)["eval/accuracy"] > 0.9  # one half by chance
    out = export(run, tmp_path / "out")
    theirs, told = transformers.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(told.values())
    assert theirs.config.id2label == {0: "colour", 1: "number"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    batch = tokenizer(["red one", "two"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    found = [theirs.config.id2label[i] for i in theirs(**batch).logits.argmax(-1).tolist()]
    assert found == ["colour", "number"]


def test_an_encoder_decoder_translates(tmp_path: Path) -> None:
    path = directory(tmp_path / "t5", "T5ForConditionalGeneration", "T5Config", dict(T5))
    data = labelled(tmp_path / "a.jsonl", "pairs")
    run = tmp_path / "run"
    bigtrain("train", *COMMON, f"run_dir={run}", "task=translation", "model=hf", f"model.path={path}", "data=labelled",
             f"data.path={data}", f"data.cache_dir={tmp_path}/cache", "engine=accelerate", "model.max_seq_len=16",
             "optimizer.lr=1e-2", "train.steps=40", "task.max_new_tokens=8")  # fmt: skip
    assert result(run)["eval/loss"] < 3
    (text,) = generate.run(run, ["red two"], max_new_tokens=8)
    assert generate.run(run, ["red two"], max_new_tokens=8, max_memory={"cpu": "60KB"}) == [text]
    out = export(run, tmp_path / "out")
    theirs, told = transformers.AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    assert not any(told.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    written = theirs.generate(**tokenizer("red two", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(written[0], skip_special_tokens=True) == text


@pytest.mark.soak  # test_auto_engines.py has the same curves in less time, without the command
@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero3", "accelerate", "accelerate engine.parallel=fsdp2"])
def test_changes_of_low_rank_from_directory_to_directory(engine: str, tmp_path: Path) -> None:
    """GPT-2 in transformers' code, whose linear layers are of a class of their own; resumed, measured, exported."""
    path = directory(tmp_path / "gpt2", "GPT2LMHeadModel", "GPT2Config", dict(GPT2))
    (path / "corpus.txt").write_text("\n".join(f"{WORDS[i % 4]} {WORDS[(i // 4) % 4]}" for i in range(4000)))
    run = tmp_path / "run"
    settings = [*COMMON, "model=hf", f"model.path={path}", "data=text", f"data.path={path}/corpus.txt",
                "data.held_out=0.2", f"data.cache_dir={tmp_path}/cache", f"engine={engine.split()[0]}",
                *engine.split()[1:], "train.lora.rank=4", "optimizer.lr=1e-2", f"run_dir={run}"]  # fmt: skip
    bigtrain("train", *settings, "train.steps=6")
    bigtrain("train", *settings, "train.steps=20")
    done = result(run)
    assert done["model/trained_parameters"] == 2 * 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))
    found = losses(run)
    assert found.keys() == set(range(1, 21))
    assert found[20] < found[1] - 0.2
    metrics, _ = evaluate.run(run, data=[], columns={})
    assert metrics["eval/loss"] == pytest.approx(done["eval/loss"], abs=1e-4)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "out"))
    before = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(theirs.transformer.wte.weight, before.transformer.wte.weight)
    change = theirs.transformer.h[0].attn.c_attn.weight - before.transformer.h[0].attn.c_attn.weight
    assert torch.linalg.matrix_rank(change.detach(), rtol=1e-4) == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"kind": "hf"}}, r"model\.path=None: missing"),
        ({"model": {"kind": "hf", "max_seq_len": 65}}, r"model\.max_seq_len=65: .* takes 64 tokens"),
        ({"optimizer": {"kind": "muon"}}, r"optimizer\.kind='muon'"),
        ({"data": {"kind": "stdlib", "isolate_documents": True}}, r"data\.isolate_documents=True"),
    ],
)
def test_bad_input(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = directory(tmp_path, "Qwen2ForCausalLM", "Qwen2Config", dict(QWEN))
    data = to_dict(Config()) | {"model": {"kind": "hf", "path": str(path)}} | changes
    if said.startswith(r"model\.max"):
        data["model"]["path"] = str(path)
    with pytest.raises(ConfigError, match=said) as caught:
        checked(data)
    assert "\n" not in str(caught.value)
    assert from_dict(to_dict(Config())) == Config()
