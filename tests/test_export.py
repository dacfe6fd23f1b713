"""A run exported, then loaded by plain transformers: same logits, same tokens, same text; and every refusal."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import Tensor, nn

from bigtrain import generate, models
from bigtrain.checkpoint.integrity import seal
from bigtrain.checkpoint.weights import write_weights
from bigtrain.compress import exported, formats
from bigtrain.config import (
    ClassificationConfig,
    Config,
    DecoderConfig,
    EncoderConfig,
    InstructionConfig,
    MaskedLMConfig,
    QuestionAnsweringConfig,
    TaggingConfig,
    TextDataConfig,
    dump,
)
from bigtrain.data.encode_instructions import Chat, rendered
from bigtrain.data.tokenizer import CHATML, find_tokenizer, train_tokenizer
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.export import export, export_quantized
from bigtrain.files import write_atomic
from bigtrain.model_card import model_card
from bigtrain.models.heads import ClassificationHead, MaskedLMHead, PairHead, QuestionAnsweringHead, TaggingHead

GPT = DecoderConfig(dim=32, n_layers=2, n_heads=4, vocab_size=320, max_seq_len=64, init_std=0.3)
LLAMA = dataclasses.replace(
    GPT, n_kv_heads=2, ffn_dim=64, positions="rotary", norm="rmsnorm", activation="swiglu", bias=False,
    tie_embeddings=False,
)  # fmt: skip
BERT = EncoderConfig(dim=32, n_layers=2, n_heads=4, vocab_size=320, max_seq_len=64, init_std=0.3)
ENCODERS = {
    "bert": BERT,
    "pre-norm": dataclasses.replace(BERT, norm_first=True),  # as the recipes have it
    "modern": dataclasses.replace(
        BERT, norm_first=True, positions="rotary", activation="geglu", bias=False, token_types=0, norm_eps=1e-5,
        pooler=False,
    ),
}  # fmt: skip
TEXT = "def main():\n    return 0\n"


def make_run(run: Path, config: Config, model: nn.Module) -> Path:
    """A run directory as training leaves it, around a random model."""
    (run / "tokenizer").mkdir(parents=True)
    train_tokenizer([TEXT * 20], 280, for_encoder=isinstance(config.model, EncoderConfig)).save(
        str(run / "tokenizer" / "tokenizer.json")
    )
    config.run_dir = str(run)
    (run / "config.yaml").write_text(dump(config))
    checkpoint = run / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    write_weights(checkpoint, ((name, weight.detach()) for name, weight in model.named_parameters()))
    seal(checkpoint, {"step": 10})
    return run


def decoder_run(run: Path, model: DecoderConfig) -> tuple[Path, models.Decoder]:
    torch.manual_seed(0)
    decoder = models.build(model).eval()
    return make_run(run, Config(model=model), decoder), decoder


class WithHeads(nn.Module):
    def __init__(self, head: str, config: EncoderConfig = BERT) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = models.build(config)
        if head == "masked_lm":
            self.head: nn.Module = MaskedLMHead(config, self.backbone.embedding)
            self.pair_head = PairHead(config)
        elif head == "tagging":
            self.head = TaggingHead(config, 3, 0.1)
        elif head == "question_answering":
            self.head = QuestionAnsweringHead(config, 0.1)
        else:
            self.head = ClassificationHead(config, 1 if head == "regression" else 3, 0.1)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model", [GPT, LLAMA], ids=["gpt", "llama"])
def test_a_causal_run(model: DecoderConfig, tmp_path: Path) -> None:
    run, ours = decoder_run(tmp_path / "run", model)
    out = export(run, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    own = find_tokenizer(str(run), "RUN")
    assert tokenizer(TEXT)["input_ids"] == own.encode(TEXT).ids
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert tokenizer.eos_token == tokenizer.pad_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == theirs.config.eos_token_id == theirs.generation_config.pad_token_id == 0
    batch = tokenizer(TEXT, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    same(theirs(**batch).logits, ours(batch["input_ids"]))

    (text,) = generate.run(run, ["def main"], max_new_tokens=20)
    batch = tokenizer([tokenizer.bos_token + "def main", tokenizer.bos_token], padding=True, return_tensors="pt")
    assert batch["attention_mask"][1, 0] == 0  # padded on the left
    written = theirs.generate(**batch, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(written[0], skip_special_tokens=True) == text
    assert (written < tokenizer.vocab_size).all()


@torch.no_grad()
def test_a_causal_run_goes_on_after_the_token_that_begins_a_text(tmp_path: Path) -> None:
    """Where the tokenizer has one of its own, as Llama's has."""
    run, _ = decoder_run(tmp_path / "run", LLAMA)
    own = find_tokenizer(str(run))
    own.add_special_tokens(["<s>", "</s>"])
    own.save(str(run / "tokenizer" / "tokenizer.json"))
    (run / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (text,) = generate.run(run, ["def main"], max_new_tokens=20)
    out = export(run, tmp_path / "out")
    theirs, tokenizer = (
        kind.from_pretrained(out) for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert theirs.config.bos_token_id == tokenizer.bos_token_id != tokenizer.eos_token_id
    written = theirs.generate(**tokenizer("<s>def main", return_tensors="pt"), max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(written[0], skip_special_tokens=True) == text
    ended = theirs.generate(**tokenizer("</s>def main", return_tensors="pt"), max_new_tokens=20, do_sample=False)
    assert written[0, 1:].tolist() != ended[0, 1:].tolist(), "the first token matters here"


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_a_run_that_answers_takes_its_chat_template_along(template: Any, tmp_path: Path) -> None:
    config = Config(model=dataclasses.replace(GPT), task=InstructionConfig(template=template))
    torch.manual_seed(0)
    run = make_run(tmp_path / "run", config, models.build(GPT))
    (run / "tokenizer" / "chat_template.jinja").write_text("the one that its base model came with")
    tokenizer = transformers.AutoTokenizer.from_pretrained(export(run, tmp_path / "out"))
    chat = [{"role": "user", "content": "def main():\n"}, {"role": "assistant", "content": "return 0"},
            {"role": "user", "content": "def"}]  # fmt: skip
    asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    pieces = [text + tokenizer.eos_token * own for text, own in rendered(chat, template)]
    begun = "<|im_start|>assistant\n" if template == "chatml" else ""
    assert asked == tokenizer.bos_token + "".join(pieces) + begun
    alone = tokenizer.apply_chat_template(chat[2:], tokenize=False, add_generation_prompt=True)
    assert alone == "".join(Chat(template, find_tokenizer(str(run))).prompt("def").pieces)


def test_chatml_with_its_marks_as_tokens_is_read_by_transformers_as_it_was_trained(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", Config(model=GPT, task=InstructionConfig(template="chatml")), models.build(GPT))
    tokenizer = find_tokenizer(str(run))
    tokenizer.add_special_tokens(list(CHATML))
    tokenizer.save(str(run / "tokenizer" / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(out := export(run, tmp_path / "out"))
    chat = [{"role": "user", "content": "def main():\n"}, {"role": "assistant", "content": "return 0"}]
    ids, learned = Chat("chatml", tokenizer).conversation(chat)
    assert ids == theirs.apply_chat_template(chat, return_dict=False)
    assert theirs.decode([token for token, own in zip(ids, learned, strict=True) if own]) == "return 0<|im_end|>"
    prompt = theirs.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
    assert Chat("chatml", tokenizer).prompt("def main():\n").ids == prompt
    end = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert theirs.convert_ids_to_tokens(end) == ["<|im_end|>", "<|endoftext|>"]


def test_the_tokenizers_own_chat_template_and_tokens_go_along(tmp_path: Path) -> None:
    config = Config(model=dataclasses.replace(GPT), task=InstructionConfig(template="tokenizer"))
    torch.manual_seed(0)
    run = make_run(tmp_path / "run", config, models.build(GPT))
    tokenizer = find_tokenizer(str(run))
    tokenizer.add_special_tokens(["<s>", "<|end|>"])
    tokenizer.save(str(run / "tokenizer" / "tokenizer.json"))
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ':' + m['content'] }}<|end|>{% endfor %}"
    told = {"bos_token": "<s>", "eos_token": "<|end|>", "chat_template": template}
    (run / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(told))
    theirs = transformers.AutoTokenizer.from_pretrained(out := export(run, tmp_path / "out"))
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "<|end|>")
    chat = [{"role": "user", "content": "def"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == "<s>user:def<|end|>"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == theirs.eos_token_id


@torch.no_grad()
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(
    "kind", ["masked_lm", "masked_lm-alone", "classification", "regression", "tagging", "question_answering"]
)
def test_runs_of_encoders_with_heads(kind: str, encoder: str, tmp_path: Path) -> None:
    config = Config(model=ENCODERS[encoder])
    model = WithHeads(kind.removesuffix("-alone"), ENCODERS[encoder]).eval()
    config.task, auto = {
        "masked_lm": (MaskedLMConfig(), transformers.AutoModelForMaskedLM),
        "masked_lm-alone": (MaskedLMConfig(sentence="none"), transformers.AutoModelForMaskedLM),
        "classification": (ClassificationConfig(dropout=0.2), transformers.AutoModelForSequenceClassification),
        "regression": (ClassificationConfig(regression=True), transformers.AutoModelForSequenceClassification),
        "tagging": (TaggingConfig(), transformers.AutoModelForTokenClassification),
        "question_answering": (QuestionAnsweringConfig(), transformers.AutoModelForQuestionAnswering),
    }[kind]
    if kind == "masked_lm-alone":
        del model.pair_head
    run = make_run(tmp_path / "run", config, model)
    if kind in ("classification", "tagging"):
        with pytest.raises(ConfigError, match=r"holds no labels\.json"):
            export(run, tmp_path / "out")
        (run / "labels.json").write_text('["O", "PER", "LOC"]')
    out = export(run, tmp_path / "out")
    theirs, told = auto.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    for name in ("pad", "unk", "cls", "sep", "mask"):
        assert getattr(tokenizer, f"{name}_token") == f"[{name.upper()}]"
    assert theirs.config.pad_token_id == tokenizer.pad_token_id
    own = find_tokenizer(str(run), "RUN").encode("def main", "return")
    batch = tokenizer(["def main", "d"], ["return", "e"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0].tolist() == own.ids
    if encoder == "modern":
        assert set(batch) == {"input_ids", "attention_mask"}
    else:
        assert batch["token_type_ids"][0].tolist() == own.type_ids
    assert not batch["attention_mask"].all()
    hidden = model.backbone(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))
    sentence = kind in ("classification", "regression")
    found = theirs(**batch)
    real = batch["attention_mask"].bool()
    if kind == "question_answering":
        same(torch.stack((found.start_logits, found.end_logits), dim=-1)[real], model.head(hidden)[real])
    elif sentence:
        same(found.logits, model.head(model.backbone.pool(hidden)))
    else:
        same(found.logits[real], model.head(hidden)[real])
    if kind in ("classification", "tagging"):
        assert theirs.config.id2label == {0: "O", 1: "PER", 2: "LOC"}
    if kind == "classification":
        assert theirs.config.classifier_dropout == 0.2
    if kind == "regression":
        assert theirs.config.problem_type == "regression"
    if kind == "masked_lm" and encoder == "bert":
        whole, told = transformers.AutoModelForPreTraining.from_pretrained(out, output_loading_info=True)
        assert not any(told.values())
        same(whole(**batch).seq_relationship_logits, model.pair_head(model.backbone.pool(hidden)))


@torch.no_grad()
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("pooler", [False, True])
def test_a_classifier_of_a_texts_mean(pooler: bool, encoder: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    shape = dataclasses.replace(ENCODERS[encoder], pooling="mean", pooler=pooler)
    config = Config(model=shape, task=ClassificationConfig())
    model = WithHeads("classification", shape).eval()
    run = make_run(tmp_path / "run", config, model)
    (run / "labels.json").write_text('["O", "PER", "LOC"]')
    out = export(run, tmp_path / "out")
    theirs = SentenceTransformer(str(out), device="cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    texts = ["def main return", "d", "return def"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert not batch["attention_mask"].all()
    hidden = model.backbone(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))
    wanted = model.head(model.backbone.pool(hidden, batch["attention_mask"]))
    same(theirs.encode(texts, convert_to_tensor=True), wanted)
    pair = tokenizer("def main", "return", return_tensors="pt")
    hidden = model.backbone(pair["input_ids"], pair["attention_mask"], pair.get("token_type_ids"))
    same(theirs.encode([("def main", "return")], convert_to_tensor=True), model.head(model.backbone.pool(hidden)))
    assert theirs[0].auto_model.config.id2label == {0: "O", 1: "PER", 2: "LOC"}
    assert theirs.max_seq_length == shape.max_seq_len
    card = (out / "README.md").read_text()
    assert "library_name: sentence-transformers" in card
    assert 'SentenceTransformer("out")' in card


@torch.no_grad()
@pytest.mark.parametrize(
    ("format", "quantize"),
    [
        ("compressed-tensors", "int8_dynamic"),
        ("compressed-tensors", "int4"),
        ("torchao", "int8_dynamic"),
        ("onnx", None),
    ],
)
def test_a_classifier_of_a_texts_mean_in_integers(format: str, quantize: str | None, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    config = Config(model=dataclasses.replace(BERT, pooling="mean"), task=ClassificationConfig())
    model = WithHeads("classification", config.model).eval()
    run = make_run(tmp_path / "run", config, model)
    (run / "labels.json").write_text('["O", "PER", "LOC"]')
    for module in ("torchao", "compressed_tensors", "onnxruntime", "onnxscript"):
        pytest.importorskip(module)
    out, measured = export_quantized(run, tmp_path / "out", format, quantize)
    assert measured["logits_difference"] < 0.03 * measured["logits_largest"]
    texts = ["def main return", "d"]
    batch = dict(transformers.AutoTokenizer.from_pretrained(out)(texts, padding=True, return_tensors="pt"))
    hidden = model.backbone(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    wanted = model.head(model.backbone.pool(hidden, batch["attention_mask"]))
    if format == "onnx":
        same(exported.Onnx(out)(**batch).logits, wanted)
        assert not (out / "modules.json").exists()
        return
    assert measured["bytes"] < 0.65 * measured["bytes_plain"]
    with formats.quietly():
        found = SentenceTransformer(str(out), device="cpu").encode(texts, convert_to_tensor=True)
    assert (found - wanted).abs().max() < (0.5 if quantize == "int4" else 0.1) * wanted.abs().max()
    assert not torch.equal(found, wanted)


def test_the_model_card(tmp_path: Path) -> None:
    run, _ = decoder_run(tmp_path / "run", GPT)
    config = Config(model=GPT, data=TextDataConfig(path=["/secret/place/corpus.txt", "wikitext"], name="wikitext-2"))
    config.launch.env = {"HF_TOKEN": "do-not-show"}
    config.init_from = "/secret/place/earlier"
    (run / "config.yaml").write_text(dump(config))
    (run / "result.json").write_text(
        json.dumps({"eval/perplexity": 12.5, "train/steps": 1000, "run": str(run), "model/parameters": 1234567})
    )
    card = (export(run, tmp_path / "my-model") / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "license": "unknown",
        "tags": ["bigtrain", "causal_lm"],
    }  # fmt: skip
    for words in (
        "# my-model\n", "| Parameters | 1,234,567 |", "| Data | corpus.txt, wikitext (wikitext-2) |",
        "| Started from | earlier |", "| eval/perplexity | 12.5 |", "| train/steps | 1,000 |", "## Licence",
        'AutoModelForCausalLM.from_pretrained("my-model")', "  n_layers: 2\n",
    ):  # fmt: skip
        assert words in body
    assert "do-not-show" not in card
    assert "/secret/place" not in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    "name",
    [
        'a: "b" #c|d', "größe & co", "-dash", "it's $HOME", "[x]{y}", "back\\slash\\n", "two\nlines", "pa\u2028rt",
        "'''\"\"\"", "---", "`code`", "%s{0}{name}", "caf\udce9", "n" * 255,
    ],
)  # fmt: skip
@pytest.mark.parametrize("by_mean", [False, True])
def test_any_name_in_the_model_card(name: str, by_mean: bool, tmp_path: Path) -> None:
    """Its header is YAML and its code Python, whatever the directory's name is, and the code names it."""
    config = Config(model=dataclasses.replace(GPT, vocab_size=97))
    if by_mean:
        model = EncoderConfig(dim=32, n_layers=1, n_heads=2, vocab_size=97, pooling="mean")
        config = Config(model=model, task=ClassificationConfig())
    card = model_card(tmp_path, name, config, Path("step-1")).encode("utf-8", "backslashreplace").decode()
    assert yaml.safe_load(card.split("---\n")[1])["tags"][0] == "bigtrain"
    code = ast.parse(card.split("```python\n")[1].split("```\n")[0])
    assert name in [node.value for node in ast.walk(code) if isinstance(node, ast.Constant)]
    assert card.count("\n# ") == 1


# ------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        export(tmp_path, tmp_path / "out")
    odd = dataclasses.replace(GPT, norm="rmsnorm")
    run, _ = decoder_run(tmp_path / "odd", odd)
    with pytest.raises(ConfigError, match=r"model\.norm='rmsnorm': transformers has no class for it"):
        export(run, tmp_path / "out")
    run, _ = decoder_run(tmp_path / "run", GPT)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for taken in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(ConfigError, match="exists already"):
            export(run, taken)
    (run / "tokenizer" / "tokenizer.json").rename(run / "elsewhere")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        export(run, tmp_path / "out")
    (run / "elsewhere").rename(run / "tokenizer" / "tokenizer.json")
    (run / "checkpoints" / "step-00000010" / "manifest.json").unlink()
    with pytest.raises(BigtrainError, match=r"damaged \(manifest\.json"):
        export(run, tmp_path / "out")
    (run / "checkpoints" / "step-00000010").rename(run / "checkpoints" / "step-00000010.bad")
    with pytest.raises(ConfigError, match="holds no complete checkpoint"):
        export(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "odd", "run"]


@pytest.mark.parametrize("format", ["huggingface", "onnx"])
def test_where_nothing_can_be_written(format: str, tmp_path: Path) -> None:
    """Said before anything is read: there is no run."""

    def write(out: Path) -> Any:
        return export(tmp_path, out) if format == "huggingface" else export_quantized(tmp_path, out, format, None)

    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/deep/below': \S+/file is a file; name a directory"):
        write(tmp_path / "file" / "deep" / "below")
    for name in ("n" * 256, "ü" * 128):
        with pytest.raises(ConfigError, match=r"\.\.\.': a name of more than 255 bytes; shorten it"):
            write(tmp_path / name / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_longest_name_that_there_is(tmp_path: Path) -> None:
    run, _ = decoder_run(tmp_path / ("r" * 255), GPT)
    for name in ("n" * 255, "ü" * 127 + "n"):
        assert (export(run, tmp_path / name) / "config.json").is_file()
        write_atomic(tmp_path / name / name, "text")
        assert (tmp_path / name / name).read_text() == "text"
        assert not list((tmp_path / name).glob(".*"))


def test_an_empty_directory_is_filled_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    run, _ = decoder_run(tmp_path / "run", GPT)
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    assert export(run, out) == out
    assert (out / "model.safetensors").is_file()

    (run / "config.yaml").write_text(dump(Config(model=dataclasses.replace(GPT, n_layers=3))))
    with pytest.raises(BigtrainError, match=r"has no parameter blocks\.2\.\S+, which GPT2LMHeadModel needs"):
        export(run, tmp_path / "deep" / "other")
    (run / "config.yaml").write_text(dump(Config(model=GPT)))
    weights = run / "checkpoints" / "step-00000010" / "model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    with pytest.raises(BigtrainError, match=r"damaged \(model\.safetensors: SHA-256 differs"):
        export(run, tmp_path / "deep" / "other")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_the_command(tmp_path: Path) -> None:
    run, _ = decoder_run(tmp_path / "run", GPT)

    def bigtrain(*arguments: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bigtrain.cli", "export", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)

    done = bigtrain(run, "--format", "huggingface", "--out", "out")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'out'}\n", "")
    again = bigtrain(run, "--out", "out")
    assert again.returncode == 2
    assert again.stderr == (
        f"bigtrain: error: out='{tmp_path / 'out'}': exists already; name a directory that is new or empty\n"
    )
    assert bigtrain(run).returncode == 2
