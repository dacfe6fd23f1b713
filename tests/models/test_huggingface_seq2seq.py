"""Our encoder-decoder is transformers' Pegasus, both ways: same logits, to 1e-5 in float32, same tokens, same text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from tokenizers import processors
from torch import Tensor

from bigtrain import cli, generate
from bigtrain.checkpoint.integrity import seal
from bigtrain.checkpoint.weights import load_matching, write_weights
from bigtrain.config import Config, Seq2SeqConfig, TranslationConfig, dump, from_dict
from bigtrain.data.encode_examples import TranslationEncoder
from bigtrain.data.tokenizer import find_tokenizer, train_tokenizer
from bigtrain.errors import ConfigError
from bigtrain.export import export, export_quantized
from bigtrain.models import Seq2Seq, build, count_parameters
from bigtrain.models.generation import translate
from bigtrain.models.huggingface import iterate_weights, read_config, to_huggingface
from bigtrain.models.seq2seq import sinusoids

OURS = Seq2SeqConfig(
    dim=32, n_layers=2, n_decoder_layers=3, n_heads=4, vocab_size=97, max_seq_len=48, init_std=0.5, ffn_dim=96
)  # fmt: skip
THEIRS: dict[str, Any] = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 48,
    "scale_embedding": True, "init_std": 0.3,
}  # fmt: skip
MARKS = {"pad": 0, "cls": 1, "sep": 2}
SOURCE = torch.randint(3, 97, (3, 16), generator=torch.Generator().manual_seed(1))
MASK = torch.ones(3, 16, dtype=torch.long)
MASK[1, 11:] = 0
MASK[2, 3:] = 0
SOURCE[MASK == 0] = MARKS["pad"]
TARGET = torch.randint(3, 97, (3, 48), generator=torch.Generator().manual_seed(2))
CONF = Path(__file__).parents[2] / "conf"


def random_model(config: Seq2SeqConfig) -> Seq2Seq:
    """With norms and biases that do something."""
    torch.manual_seed(0)
    model = build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def written(config: Seq2SeqConfig, model: Seq2Seq, directory: Path, architecture: str = "translation") -> Any:
    """transformers' model of what `to_huggingface` makes of ours."""
    weights = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    settings, tensors = to_huggingface(config, weights, architecture)
    write_weights(directory, tensors)
    settings |= {"pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": 2}
    (directory / "config.json").write_text(json.dumps(settings))
    auto = transformers.AutoModelForSeq2SeqLM if architecture == "translation" else transformers.AutoModel
    theirs, told = auto.from_pretrained(directory, output_loading_info=True)
    assert not any(told.values())
    return theirs


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
def test_in_and_out(activation: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(OURS, activation=activation)
    ours = random_model(config)
    theirs = written(config, ours, tmp_path)
    expected = ours(SOURCE, MASK, TARGET)
    assert expected.std() > 0.5
    same(theirs(input_ids=SOURCE, attention_mask=MASK, decoder_input_ids=TARGET).logits, expected)

    assert read_config(tmp_path) == config
    again = build(config).eval()
    report = load_matching(again, iterate_weights(tmp_path, config))
    assert not report.skipped
    assert not report.new
    assert torch.equal(again(SOURCE, MASK, TARGET), expected)

    base = written(config, ours, tmp_path, "base")
    assert type(base).__name__ == "PegasusModel"
    assert read_config(tmp_path) == config
    same(base(SOURCE, MASK, TARGET).last_hidden_state, ours.decode(TARGET, ours.encode(SOURCE, MASK), MASK))


@torch.no_grad()
@pytest.mark.parametrize("num_beams", [1, 4])
def test_the_tokens_that_both_write(num_beams: int, tmp_path: Path) -> None:
    ours = random_model(dataclasses.replace(OURS, init_std=0.8))
    options: dict[str, Any] = {"do_sample": False, "num_beams": num_beams}
    expected = translate(ours, 3, ours(SOURCE, MASK), MASK, MARKS, 97, 40, options)
    assert len(set(expected[0])) > 3
    written_by_theirs = written(ours.config, ours, tmp_path).generate(
        input_ids=SOURCE, attention_mask=MASK, max_new_tokens=40, **options
    )
    rows = written_by_theirs[:, 1:].tolist()
    assert [row[: row.index(2)] if 2 in row else row for row in rows] == expected


@torch.no_grad()
def test_a_pegasus_that_transformers_made(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.PegasusConfig(**THEIRS, activation_function="relu")
    theirs = transformers.PegasusForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    found = read_config(tmp_path)
    assert found == dataclasses.replace(OURS, init_std=0.3)
    ours = build(found).eval()
    assert not load_matching(ours, iterate_weights(tmp_path, found)).new
    expected = theirs(input_ids=SOURCE, attention_mask=MASK, decoder_input_ids=TARGET).logits
    same(ours(SOURCE, MASK, TARGET), expected)


@torch.no_grad()
def test_sinusoids_are_those_of_pegasus() -> None:
    """Computed in float32 here, in float64 there."""
    config = transformers.PegasusConfig(**THEIRS | {"max_position_embeddings": 512})
    table = transformers.PegasusModel(config).get_position_embeddings()[0].weight
    torch.testing.assert_close(sinusoids(torch.arange(512), 32), table, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["transformer_tiny", "transformer_base", "transformer_big", "translation"])
def test_what_is_shipped_can_be_exported(name: str) -> None:
    fields: dict[str, Any] = {}
    if name == "translation":
        recipe = yaml.safe_load((CONF / "experiment" / "translation.yaml").read_text())
        assert {"override /model": "transformer_tiny"} in recipe["defaults"]
        name, fields = "transformer_tiny", recipe["model"]
    fields = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text()) | fields
    assert fields.pop("defaults") == ["_seq2seq", "_self_"]
    config = from_dict({"model": {"kind": "seq2seq", "vocab_size": 4096} | fields}).model
    assert isinstance(config, Seq2SeqConfig)
    settings, _ = to_huggingface(config, [], "translation")
    with torch.device("meta"):
        theirs = transformers.PegasusForConditionalGeneration(transformers.PegasusConfig.from_dict(settings))
    positions = 2 * config.max_seq_len * config.dim
    assert sum(parameter.numel() for parameter in theirs.parameters()) - positions == count_parameters(config)


# --------------------------------------------------------------------------------------------------- a run


def make_run(run: Path, model: Seq2Seq, max_new_tokens: int = 20) -> Path:
    """A run directory as training leaves it."""
    (run / "tokenizer").mkdir(parents=True)
    tokenizer = train_tokenizer(["def main(x):\n    return x + 1\n" * 20], 280, for_encoder=True)
    tokenizer.save(str(run / "tokenizer" / "tokenizer.json"))
    task = TranslationConfig(max_new_tokens=max_new_tokens)
    (run / "config.yaml").write_text(dump(Config(model=model.config, task=task, run_dir=str(run))))
    checkpoint = run / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    write_weights(checkpoint, ((name, weight.detach()) for name, weight in model.named_parameters()))
    seal(checkpoint, {"step": 10})
    return run


@torch.no_grad()
def test_a_translation_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = random_model(dataclasses.replace(OURS, vocab_size=320, init_std=0.8))
    ours.embedding.weight[280:] *= 2
    run = make_run(tmp_path / "run", ours)
    assert cli._run(["export", str(run), "--format", "huggingface", "--out", str(tmp_path / "out")]) == 0
    out = Path(capsys.readouterr().out.strip())
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    theirs, told = transformers.AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    assert not any(told.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    own = find_tokenizer(str(run), "RUN")
    cls, sep, pad = (own.token_to_id(token) for token in ("[CLS]", "[SEP]", "[PAD]"))
    settings = theirs.generation_config
    for found in (theirs.config, settings, tokenizer):
        assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (cls, sep, pad)
    assert (theirs.config.decoder_start_token_id, settings.decoder_start_token_id) == (cls, cls)
    assert (theirs.config.forced_eos_token_id, settings.forced_eos_token_id) == (None, None)

    texts = ["def main(x):", "return", "x + 1\n" * 3]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert not batch["attention_mask"].all()
    encoded = TranslationEncoder(TranslationConfig(), own, ours.config).sources(texts)
    for row, mask, ids in zip(batch["input_ids"], batch["attention_mask"], encoded, strict=True):
        assert row[mask.bool()].tolist() == ids
    target = TARGET[:, :20]
    found = theirs(**batch, decoder_input_ids=target).logits
    same(found, ours(batch["input_ids"], batch["attention_mask"], target))
    for num_beams in (1, 4):
        # Of 320 rows of the embedding 280 at most are words: the others, likely ones, are neither written nor weighed.
        tokens = theirs.generate(**batch, num_beams=num_beams)
        expected = generate.run(run, texts, max_new_tokens=20, num_beams=num_beams)
        assert tokenizer.batch_decode(tokens, skip_special_tokens=True) == expected
        assert len(set(expected)) == 3
    card = (out / "README.md").read_text()
    for words in ("pipeline_tag: translation", "AutoModelForSeq2SeqLM.from_pretrained(", "  n_decoder_layers: 3\n"):
        assert words in card


def test_its_tokenizer_puts_the_marks_around_a_text_even_if_it_did_not(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", random_model(dataclasses.replace(OURS, vocab_size=320)), max_new_tokens=100)
    file = run / "tokenizer" / "tokenizer.json"
    tokenizer = find_tokenizer(str(run), "RUN")
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(file))
    out = export(run, tmp_path / "out")
    found = transformers.AutoTokenizer.from_pretrained(out)("return x")["input_ids"]
    assert found == [tokenizer.token_to_id("[CLS]"), *tokenizer.encode("return x").ids, tokenizer.token_to_id("[SEP]")]
    assert transformers.GenerationConfig.from_pretrained(out).max_new_tokens == 48, "there is no 49th position"


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "rmsnorm"}, "model.norm='rmsnorm': transformers has no class for it: its Pegasus"),
        ({"norm_eps": 1e-6}, "model.norm_eps=1e-06: transformers has no class for it"),
        ({"activation": "swiglu"}, "model.activation='swiglu': transformers has no class for it"),
        ({"bias": False}, "model.bias=False: transformers has no class for it"),
    ],
)
def test_what_no_class_computes_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_huggingface(dataclasses.replace(OURS, **changes), [], "translation")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["onnx", "torchao", "compressed-tensors"])
def test_formats_of_models_that_read_one_text_are_refused(format: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", random_model(dataclasses.replace(OURS, vocab_size=320)))
    with pytest.raises(ConfigError, match=rf"--format='{format}': .*take huggingface"):
        export_quantized(run, tmp_path / "out", format, None)
    assert not (tmp_path / "out").exists()


@torch.no_grad()
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale_embedding": False}, "scale_embedding=False: our encoder-decoder scales"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False: our encoder-decoder has one table"),
        ({"decoder_attention_heads": 2}, "decoder_attention_heads=2: our decoder has as many heads"),
        ({"decoder_ffn_dim": 64}, "decoder_ffn_dim=64: our decoder's layers"),
        ({"activation_function": "silu"}, "activation_function=silu: one of"),
        ("model.encoder.embed_positions", "has learned model.encoder.embed_positions.weight"),
        ("final_logits_bias", "has learned final_logits_bias"),
    ],
)
def test_a_pegasus_that_is_not_ours_is_refused(values: Any, message: str, tmp_path: Path) -> None:
    changes = values if isinstance(values, dict) else {}
    model = transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**THEIRS | changes))
    if values == "final_logits_bias":
        model.final_logits_bias.normal_()
    elif isinstance(values, str):
        model.get_submodule(values).weight.normal_()
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)
