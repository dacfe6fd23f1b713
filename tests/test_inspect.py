"""Attributions sum to the score's change, attention is the plain softmax, and the word that decides is found."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from bigtrain import inspect, models
from bigtrain.attribution import TOLERANCE, attention_of
from bigtrain.config import (
    ClassificationConfig,
    Config,
    EncoderConfig,
    InstructionConfig,
    TaggingConfig,
    TranslationConfig,
)
from bigtrain.data.tokenizer import find_tokenizer, special_ids, train_tokenizer
from bigtrain.errors import ConfigError
from bigtrain.export import export
from bigtrain.models.heads import ClassificationHead, TaggingHead
from bigtrain.tasks.labelled import WithHead, build_encoder
from tests.test_export import BERT, GPT, LLAMA, decoder_run, make_run

ENCODER = EncoderConfig(dim=32, n_layers=2, n_heads=4, vocab_size=320, max_seq_len=32, dropout=0.0)
WORDS = ["river", "table", "green", "seven", "winter", "paper", "garden", "music", "stone", "window"]
LABELS = ["calm", "loud"]


def sentence(random: np.random.Generator, keyword: str) -> str:
    words = [str(word) for word in random.choice(WORDS, size=7)]
    words[int(random.integers(1, 7))] = keyword
    return " ".join(words)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model that has learned the one word that decides: thunder is loud, silence is calm."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    tokenizer = train_tokenizer([f"{word} " * 50 for word in [*WORDS, "thunder", "silence"]], 320, for_encoder=True)
    model = WithHead(build_encoder(ENCODER, pooled=True), ClassificationHead(ENCODER, 2, 0.0), pooled=True)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    pad = special_ids(tokenizer)["pad"]
    for _ in range(80):
        labels = random.integers(2, size=32)
        encoded = [tokenizer.encode(sentence(random, ("silence", "thunder")[label])).ids for label in labels]
        length = max(map(len, encoded))
        tokens = torch.tensor([row + [pad] * (length - len(row)) for row in encoded])
        loss = F.cross_entropy(model(tokens, (tokens != pad).long()), torch.from_numpy(labels))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 0.1
    run = make_run(
        tmp_path_factory.mktemp("planted") / "run", Config(model=ENCODER, task=ClassificationConfig()), model
    )
    tokenizer.save(str(run / "tokenizer" / "tokenizer.json"))
    (run / "labels.json").write_text(json.dumps(LABELS))
    return run


def adds_up(found: inspect.Inspection) -> None:
    attribution = found.attribution
    change = attribution.score - attribution.baseline
    assert float(attribution.tokens.sum()) == pytest.approx(change + attribution.delta, abs=1e-4)
    assert abs(attribution.delta) <= TOLERANCE * abs(change) + 1e-4
    rows = found.attention.sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    assert found.attention.shape[-2:] == (len(found.text.ids),) * 2


@pytest.mark.parametrize(("keyword", "label"), [("thunder", "loud"), ("silence", "calm")])
def test_the_word_that_decides_has_the_largest_attribution(
    planted: Path, keyword: str, label: str, tmp_path: Path
) -> None:
    random = np.random.default_rng(1)
    for _ in range(3):
        found, _ = inspect.run(planted, sentence(random, keyword), out=tmp_path)
        adds_up(found)
        assert found.answers[0][0] == label
        by_word = sorted(found.by_word(), key=lambda pair: -pair[1])
        assert by_word[0][0] == keyword
        assert by_word[0][1] > 3 * by_word[1][1]


def test_what_is_written_and_said(planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bigtrain.cli import command

    text = "river <b> thunder & table"
    command.main(
        ["inspect", str(planted), "--text", text, "--target", "calm", "--out", str(tmp_path)], standalone_mode=False
    )
    said = capsys.readouterr().out
    assert "explained: the label 'calm'" in said
    assert "convergence delta" in said
    assert str(tmp_path / "index.html") in said
    for name in ("attribution.png", "attention.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size > 5000
    page = (tmp_path / "index.html").read_text()
    assert "&lt;" in page
    assert "<b>" not in page.split("<main>")[1]
    assert "http" not in page
    assert page.count("data:image/png;base64,") == 2
    told = json.loads((tmp_path / "inspection.json").read_text())
    assert told["explained"] == "the label 'calm'"
    total = sum(word["attribution"] for word in told["words"])
    assert total == pytest.approx(told["score"] - told["baseline_score"] + told["convergence_delta"], abs=1e-4)
    strongest = max(told["words"], key=lambda word: abs(word["attribution"]))
    assert (strongest["word"], strongest["attribution"] < 0) == ("thunder", True)  # it speaks against calm
    assert "".join(token["token"] for token in told["tokens"][1:-1]) == text


def test_a_browser_shows_the_page(planted: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    _, page = inspect.run(planted, "river thunder table", out=tmp_path)
    shown = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    assert "Why the label 'loud'?" in shown
    assert "> thunder</span>" in shown


def test_pairs_and_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = WithHead(build_encoder(BERT, pooled=True), ClassificationHead(BERT, 1, 0.0), pooled=True)
    run = make_run(tmp_path / "run", Config(model=BERT, task=ClassificationConfig(regression=True)), model)
    found, page = inspect.run(run, "def main", pair="return 0")
    assert page == run / "inspection" / "index.html"
    adds_up(found)
    assert found.answers == [("number", pytest.approx(found.attribution.score, abs=1e-5))]
    assert sum(found.text.types) > 0
    assert [value == 0 for value in found.attribution.tokens.tolist()] == found.text.special
    with pytest.raises(ConfigError, match="gives a number"):
        inspect.run(run, "def main", target="calm")


def test_a_tag_is_explained_where_it_is_likeliest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = WithHead(build_encoder(BERT, pooled=False), TaggingHead(BERT, 3, 0.0), pooled=False)
    run = make_run(tmp_path / "run", Config(model=BERT, task=TaggingConfig()), model)
    (run / "labels.json").write_text(json.dumps(["B-F", "B-X", "O"]))
    found, _ = inspect.run(run, "def main(): return 0", target="B-X")
    adds_up(found)
    with torch.no_grad():
        probabilities = model.eval()(torch.tensor([found.text.ids]))[0].softmax(-1)
    words = found.text.words
    first = [i for i in range(1, len(words) - 1) if words[i] != words[i - 1]]
    assert len(first) == 4  # words go by spaces
    assert found.at == max(first, key=lambda i: probabilities[i, 1])
    assert dict(found.answers)["B-X"] == pytest.approx(float(probabilities[found.at, 1]), abs=1e-5)


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
def test_the_next_token_is_explained(config: Any, tmp_path: Path) -> None:
    run, decoder = decoder_run(tmp_path / "run", config)
    found, _ = inspect.run(run, "def main")
    adds_up(found)
    with torch.no_grad():
        logits = decoder(torch.tensor([found.text.ids]))[0, -1, : find_tokenizer(str(run), "RUN").get_vocab_size()]
    assert found.answers[0][1] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)
    assert found.attribution.score == pytest.approx(float(logits.max() - logits.mean()), abs=1e-4)
    assert torch.equal(found.attention, found.attention.tril())  # nobody looks ahead
    other, _ = inspect.run(run, "def main", target="x")
    assert other.question == "'x' as the next token"
    with pytest.raises(ConfigError, match=r"target='x\+\+\+': is \d tokens"):
        inspect.run(run, "def main", target="x+++")


def test_an_instruction_is_read_as_it_was_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = InstructionConfig(template="chatml")
    run = make_run(tmp_path / "run", Config(model=GPT, task=task), models.build(GPT))
    found, _ = inspect.run(run, "def main")
    assert "".join(found.text.pieces[1:]) == "<|im_start|>user\ndef main<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
@torch.no_grad()
def test_attention_of_decoders_is_the_one_that_transformers_shows(config: Any, tmp_path: Path) -> None:
    run, decoder = decoder_run(tmp_path / "run", config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        export(run, tmp_path / "out"), attn_implementation="eager"
    )
    tokens = torch.randint(3, 280, (2, 11))
    with attention_of(decoder) as found:
        decoder(tokens)
    same_maps(found, theirs(tokens, output_attentions=True).attentions)


@torch.no_grad()
def test_attention_of_a_padded_encoder_is_the_one_that_transformers_shows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = WithHead(build_encoder(BERT, pooled=True), ClassificationHead(BERT, 2, 0.0), pooled=True).eval()
    run = make_run(tmp_path / "run", Config(model=BERT, task=ClassificationConfig()), model)
    (run / "labels.json").write_text(json.dumps(LABELS))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        export(run, tmp_path / "out"), attn_implementation="eager"
    ).eval()
    tokens = torch.randint(6, 280, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    with attention_of(model) as found:
        model(tokens, mask)
    same_maps(found, theirs(tokens, attention_mask=mask, output_attentions=True).attentions)
    assert float(found[0][1, ..., 5:].abs().max()) == 0.0
    before = len(found)
    model(tokens)
    assert len(found) == before  # the hooks are gone


@torch.no_grad()
def test_attention_gives_each_layers_own_output() -> None:
    """With rotary positions and a pre-norm encoder too: probabilities times values are what the layer gave."""
    torch.manual_seed(0)
    config = dataclasses.replace(BERT, positions="rotary", norm_first=True)
    model = models.build(config).eval()
    given: list[tuple[Any, Tensor]] = []
    layer = model.blocks[1].attention
    layer.register_forward_hook(lambda module, arguments, output: given.append((arguments[0], output)))
    with attention_of(model) as found:
        model(torch.randint(6, 280, (2, 9)))
    x, output = given[0]
    values = layer.qkv(x)[..., 2 * config.dim :].unflatten(-1, (config.n_heads, -1)).transpose(1, 2)
    mixed = (found[1] @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.out(mixed), output, rtol=1e-4, atol=1e-4)


def same_maps(found: list[Tensor], expected: tuple[Tensor, ...]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_inspected(planted: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ({"text": " "}, "text=' ': empty"),
        ({"text": "river", "target": "lowd"}, "target='lowd': RUN's model has no such label; did you mean loud?"),
    ):
        with pytest.raises(ConfigError) as raised:
            inspect.run(planted, **arguments, out=tmp_path / "out")
        assert str(raised.value) == message
    assert not (tmp_path / "out").exists()
    run, _ = decoder_run(tmp_path / "gpt", GPT)
    with pytest.raises(ConfigError, match="reads one text"):
        inspect.run(run, "def", pair="main")
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="no such file"):
        inspect.run(tmp_path / "none", "def")
    shape = {"kind": "seq2seq", "dim": 32, "n_layers": 1, "n_decoder_layers": 1, "n_heads": 2, "vocab_size": 320}
    from bigtrain.config import dump, from_dict

    other = from_dict({"model": shape, "task": {"kind": TranslationConfig().kind}})
    (run / "config.yaml").write_text(dump(other))
    with pytest.raises(ConfigError, match="is of task=translation with a model of kind seq2seq"):
        inspect.run(run, "def")


def test_what_is_too_long_is_cut_with_a_word(planted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):  # an earlier test's Hydra may have raised it
        found, _ = inspect.run(planted, "river " * 60 + "thunder", out=tmp_path)
    assert len(found.text.ids) == ENCODER.max_seq_len
    assert "the text was cut" in caplog.text
