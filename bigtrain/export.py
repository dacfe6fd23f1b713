"""A run's newest checkpoint as a directory that plain transformers loads, with tokenizer and model card; or the same
quantized, or as an ONNX graph."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtrain import config as configuration
from bigtrain import encryption, sentence_encoder
from bigtrain.checkpoint import checkpoints, newest
from bigtrain.checkpoint.weights import iterate_weights, write_weights
from bigtrain.compress import quantize as quantization
from bigtrain.compress.quantize import Trained
from bigtrain.config import (
    ClassificationConfig,
    Config,
    EncoderConfig,
    EncryptionConfig,
    HuggingFaceConfig,
    InstructionConfig,
    MaskedLMConfig,
    Seq2SeqConfig,
    TaggingConfig,
    TranslationConfig,
)
from bigtrain.data.encode_examples import translation_marks
from bigtrain.data.encode_instructions import Chat, exported_template
from bigtrain.data.tokenizer import begin_id, find_tokenizer, load_tokenizer, special_ids, vocabulary_size
from bigtrain.errors import ConfigError
from bigtrain.files import NAME_MAX, as_utf8, hidden_beside
from bigtrain.model_card import model_card
from bigtrain.models.huggingface import to_huggingface
from bigtrain.models.stored import StoredTensors

FORMATS = ("huggingface", "compressed-tensors", "torchao", "onnx")
CAUSAL = ("causal_lm", "instruction")  # tasks of models that write on
LABELS = "labels.json"  # of a run that learns labels: their names, in the order of the head's outputs


def export(
    run: Path, out: Path, encrypt: bool = False, key: EncryptionConfig | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Path:  # fmt: skip
    """Write the model of run directory `run` to `out` in the Hugging Face format and return `out`.

    Of a run with quantized weights, those: rounded, in the type that they were trained in, which `say` is told.
    `out` appears when it is whole. Raises ConfigError for what is no run, has no checkpoint or no labels, a model that
    transformers has no class for, or an `out` that is not empty; BigtrainError for a damaged checkpoint, OSError where
    the disk refuses.
    """
    out = _new(out)
    config, checkpoint = _opened(run)
    if encrypt:
        key = key if key is not None and encryption.enabled(key) else config.train.encryption
        encryption.read_key(key)
    found = quantization.trained(config, checkpoint)
    with _staging(out) as staging:
        _write(run, config, checkpoint, staging, _rounded(iterate_weights(checkpoint), found), out.name)
        if encrypt:
            assert key is not None
            encryption.encrypt_directory(staging, key, only="*.safetensors*")
    if found is not None:
        say(_not_integers(found, out))
    return out


def _not_integers(found: Trained, out: Path) -> str:
    stored = StoredTensors(out)
    kind = str(stored.tensor(stored.names[0]).dtype).removeprefix("torch.")
    size = sum(path.stat().st_size for path in out.glob("model*.safetensors*")) / 1e6
    return (
        f"RUN computes with int{found.scheme.bits} weights in {len(found.scales)} layers. Format huggingface holds no"
        f" integers: they are written as {kind}, rounded to the same values, {size:.2f} MB in all."
        " --format compressed-tensors keeps them."
    )


def export_quantized(run: Path, out: Path, format: str, quantize: str | None) -> tuple[Path, dict[str, Any]]:
    """The same in another of FORMATS; `out`, and what `exported.measure` found when it was loaded again.

    quantize: a name of quantize.PTQ, or calibrated.METHODS for compressed-tensors; None for a run that trained with
    quantized weights, and these are written.
    Raises as `export`, and ConfigError for what the format has no room for or a package that is missing.
    """
    from bigtrain.compress import calibrated, exported, formats

    out = _new(out)
    config, checkpoint = _opened(run)
    if config.task.kind == "translation":
        problem = "is of models that read one text, and RUN's reads two: its source and what it has written"
        raise ConfigError("--format", format, problem, "take huggingface")
    found = quantization.trained(config, checkpoint)
    if found is not None and quantize is not None:
        problem = "RUN has trained with quantized weights, and they are what is written"
        raise ConfigError("--quantize", quantize, problem, "leave it out")
    with_data = quantize in calibrated.METHODS
    scheme = calibrated.SCHEME if with_data else quantization.PTQ.get(quantize or "", found.scheme if found else None)
    formats.check(format, scheme)
    if format == "onnx" and quantize not in (None, "int8_dynamic"):
        problem = "onnxruntime multiplies int8 with int8: a graph holds no weights of it alone"
        raise ConfigError("--quantize", quantize, problem, "take int8_dynamic")
    if with_data:
        assert quantize is not None
        if format != "compressed-tensors":
            raise ConfigError("--quantize", quantize, f"has no format {format}", "take compressed-tensors")
        calibrated.check(quantize, config)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=_existing(out.parent)) as folder:
        plain = Path(folder)
        # A graph holds what is computed; the others are made of the weights as they were trained, but for a sentence
        # encoder's last layers, which are no transformers' and lie there as they are computed with.
        rounded = found if format == "onnx" or found is None else found.only(sentence_encoder.after_mean)
        weights = _rounded(iterate_weights(checkpoint), rounded)
        settings = _write(run, config, checkpoint, plain, weights, out.name, format)
        if found is not None and format != "onnx":
            scales: Iterator[tuple[str, Tensor]] = _expanded(iterate_weights(checkpoint), found)
            if sentence_encoder.is_one(config):
                scales = sentence_encoder.set_apart(scales, {})
            _, expanded = _mapped(run, config, scales)
            scale_of = formats.trained_grids(settings, expanded, found.scheme)
        elif quantize is not None and format != "onnx" and not with_data:
            assert scheme is not None
            scale_of = formats.grids(settings, iterate_weights(plain), scheme)
        else:
            scale_of = {}
        with _staging(out) as staging, formats.quietly():
            if with_data:
                assert quantize is not None
                calibrated.write(quantize, config, settings, plain, staging)
            else:
                formats.write(format, plain, staging, scheme, scale_of)
            measured = exported.measure(config, format, plain, staging, settings, scheme, scale_of)
            same = bool(scale_of) or (format == "onnx" and not (scheme and scheme.activations))
            measured["compared_with"] = "the same in PyTorch" if same else "the model before it was quantized"
    return out, measured


def _new(out: Path) -> Path:
    """`out` in full. Raises ConfigError for one that is taken or cannot be made, before the model is read."""
    out = out.expanduser().resolve()
    way_out = "name a directory that is new or empty"
    if too_long := [part for part in out.parts if len(os.fsencode(part)) > NAME_MAX]:
        raise ConfigError("out", f"{too_long[0][:40]}...", f"a name of more than {NAME_MAX} bytes", "shorten it")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError("out", str(out), "exists already", way_out)
    above = next(parent for parent in out.parents if parent.exists())
    if not above.is_dir():
        raise ConfigError("out", str(out), f"{above} is a file", way_out)
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError("out", str(out), f"{above} may not be written to", way_out)
    return out


def _opened(run: Path) -> tuple[Config, Path]:
    config = configuration.load(run / "config.yaml")
    checkpoint = newest(run)
    if checkpoint is None:
        raise ConfigError("RUN", str(run), "holds no complete checkpoint", "train until the first one is saved")
    return config, checkpoint


def _existing(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` if the body succeeds, and nothing if not."""
    staging = hidden_beside(out)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in (*staging.rglob("*.safetensors"), *staging.glob("*.onnx")):
            shutil.copymode(staging / "config.json", path)  # safetensors lets nobody else read what it writes
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _rounded(weights: Iterable[tuple[str, Tensor]], found: Trained | None) -> Iterator[tuple[str, Tensor]]:
    for name, weight in weights:
        scale = None if found is None else found.scale(name, weight)
        yield name, weight if found is None or scale is None else quantization.rounded(weight, scale, found.scheme)


def _expanded(weights: Iterable[tuple[str, Tensor]], found: Trained) -> Iterator[tuple[str, Tensor]]:
    """In each weight's place its scales, repeated to its shape: so that they go where its parts go."""
    for name, weight in weights:
        scale = found.scale(name, weight)
        columns = found.scheme.group_size or weight.shape[-1]
        yield name, torch.zeros_like(weight) if scale is None else scale.repeat_interleave(columns, 1)


def _mapped(
    run: Path, config: Config, weights: Iterator[tuple[str, Tensor]]
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """(config.json, tensors by transformers' names)."""
    _, tokens = read_tokenizer(run, config)
    task, names = config.task, labels(run, config)
    if isinstance(config.model, HuggingFaceConfig):
        from bigtrain.models.huggingface import auto

        return auto.to_huggingface(config.model, weights, task.kind, names, problem_type(config), tokens)
    model = config.model
    if sentence_encoder.is_one(config):
        assert isinstance(model, EncoderConfig)
        model = replace(model, pooler=False)  # nothing reads the first token
    settings, tensors = to_huggingface(
        model, weights, architecture(config), names, problem_type(config), tokens.get("pad_token_id", 0)
    )
    settings |= {name: tokens.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if isinstance(task, (ClassificationConfig, TaggingConfig)):
        settings["classifier_dropout"] = task.dropout
    if isinstance(config.model, Seq2SeqConfig):
        settings["decoder_start_token_id"] = tokens["bos_token_id"]
    return settings, tensors


def _write(
    run: Path,
    config: Config,
    checkpoint: Path,
    staging: Path,
    weights: Iterator[tuple[str, Tensor]],
    name: str,
    format: str = "huggingface",
) -> dict[str, Any]:
    """All files of a Hugging Face directory into `staging`; its config.json."""
    after_mean: dict[str, Tensor] = {}
    if sentence_encoder.is_one(config):
        weights = sentence_encoder.set_apart(weights, after_mean)
    settings, tensors = _mapped(run, config, weights)
    tokenizer, tokens = read_tokenizer(run, config)
    write_weights(staging, tensors)
    write_json(staging / "config.json", settings)
    if after_mean:
        assert isinstance(config.model, EncoderConfig)
        sentence_encoder.write_modules(staging, config.model, after_mean)
    if config.task.kind in (*CAUSAL, "translation"):
        write_json(staging / "generation_config.json", generation_config(config, tokenizer, tokens))
    if isinstance(config.model, Seq2SeqConfig):
        enclosed(tokenizer, tokens).save(str(staging / "tokenizer.json"))
    else:
        shutil.copyfile(run / "tokenizer" / "tokenizer.json", staging / "tokenizer.json")
    write_json(staging / "tokenizer_config.json", told(run) | tokenizer_config(config, tokens))
    if isinstance(config.task, InstructionConfig):  # as it was trained, whatever the model came with
        template = exported_template(config.task.template, tokenizer)
        (staging / "chat_template.jinja").write_text(template, encoding="utf-8")
    elif (run / "tokenizer" / "chat_template.jinja").is_file():
        shutil.copyfile(run / "tokenizer" / "chat_template.jinja", staging / "chat_template.jinja")
    (staging / "README.md").write_bytes(as_utf8(model_card(run, name, config, checkpoint, format)))
    return settings


def architecture(config: Config) -> str:
    """What the exported model is for, as to_huggingface calls it."""
    if isinstance(config.task, MaskedLMConfig) and config.task.sentence != "none":
        return "pretraining"
    if sentence_encoder.is_one(config):
        return "base"
    return "causal_lm" if config.task.kind in CAUSAL else config.task.kind


def labels(run: Path, config: Config) -> list[str] | None:
    """The names of a classifier's outputs; None for other tasks. From labels.json, else from the newest checkpoint.

    Raises ConfigError if the run has not kept them.
    """
    regression = isinstance(config.task, ClassificationConfig) and config.task.regression
    if regression or not isinstance(config.task, (ClassificationConfig, TaggingConfig)):
        return None
    try:
        names = json.loads((run / LABELS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = checkpoints(run)
        names = found[-1].manifest.get("labels") if found else None
        if not names:
            raise ConfigError("RUN", str(run), f"holds no {LABELS}, the names of its labels") from None
    except (OSError, ValueError) as error:
        raise ConfigError("RUN", str(run), f"its {LABELS} cannot be read ({error})") from None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError("RUN", str(run), f"its {LABELS} is no list of names")
    return names


def problem_type(config: Config) -> str | None:
    if not isinstance(config.task, ClassificationConfig):
        return None
    return "regression" if config.task.regression else "single_label_classification"


# ------------------------------------------------------------------------------------------------ tokenizer


def read_tokenizer(run: Path, config: Config) -> tuple[Any, dict[str, Any]]:
    """(tokenizer, {eos_token: its text, eos_token_id: its id, ...}), of the special tokens that the run trained with.

    A causal model's documents and conversations begin with the tokenizer's token for that, or with the one that ends
    them, which also pads if there is none for that. What a translation is written between begins and ends a text.
    """
    path = str(run / "tokenizer")
    if config.task.kind in CAUSAL:
        tokenizer, eos_id = load_tokenizer(path, "RUN")
        known = special_ids(tokenizer)
        ids = {"bos": begin_id(tokenizer), "eos": eos_id, "pad": known.get("pad", eos_id)}
        ids |= {"unk": known["unk"]} if "unk" in known else {}
    else:
        tokenizer = find_tokenizer(path, "RUN")
        ids = special_ids(tokenizer)
        if isinstance(config.model, Seq2SeqConfig):
            marks = translation_marks(tokenizer, config.model)
            ids |= {"bos": marks["cls"], "eos": marks["sep"]}
    named = {f"{name}_token": tokenizer.id_to_token(number) for name, number in ids.items()}
    return tokenizer, named | {f"{name}_token_id": number for name, number in ids.items()}


def enclosed(tokenizer: Any, tokens: dict[str, Any]) -> Any:
    """The tokenizer, made to put around a text what TranslationEncoder does, whatever it did by itself."""
    from tokenizers import processors

    begin, end = tokens["bos_token"], tokens["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(begin, tokens["bos_token_id"]), (end, tokens["eos_token_id"])],
    )
    return tokenizer


def told(run: Path) -> dict[str, Any]:
    """What the tokenizer_config.json says that the run's tokenizer came with, but for the class: ours takes any."""
    try:
        values = json.loads((run / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
        return {key: value for key, value in values.items() if key not in ("tokenizer_class", "auto_map", "backend")}
    except (OSError, ValueError, AttributeError):
        return {}


def tokenizer_config(config: Config, tokens: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: the class that takes any tokenizer.json, in transformers 4 and 5."""
    causal = config.task.kind in CAUSAL
    # A decoder must get no token_type_ids: transformers' GPT-2 would add the embeddings of those "tokens".
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    if (
        causal
        or isinstance(config.model, Seq2SeqConfig)
        or (isinstance(config.model, EncoderConfig) and not config.model.token_types)
        or (isinstance(config.model, HuggingFaceConfig) and config.model.architecture.get("type_vocab_size", 0) < 2)
    ):
        inputs.remove("token_type_ids")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.model.max_seq_len,
        "model_input_names": inputs,
        "padding_side": "left" if causal else "right",  # a causal model writes on from the last column
        "clean_up_tokenization_spaces": False,
    } | {name: token for name, token in tokens.items() if name.endswith("_token")}


def generation_config(config: Config, tokenizer: Any, tokens: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json. Rows of the embedding that no token has (it is rounded up) are never written."""
    if isinstance(config.model, HuggingFaceConfig) and config.task.kind == "translation":
        marks = translation_marks(tokenizer, config.model)
        return {
            "decoder_start_token_id": marks["cls"], "eos_token_id": marks["sep"], "pad_token_id": marks["pad"],
            "max_new_tokens": config.task.max_new_tokens if isinstance(config.task, TranslationConfig) else None,
        }  # fmt: skip
    settings = {name: tokens[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if isinstance(config.task, InstructionConfig):  # a response ends with its template's mark too
        closing = Chat(config.task.template, tokenizer).closing
        if closing not in (None, tokens["eos_token_id"]):
            settings["eos_token_id"] = [closing, tokens["eos_token_id"]]
    if isinstance(config.task, TranslationConfig):
        longest = min(config.task.max_new_tokens, config.model.max_seq_len)  # theirs has no position after that
        settings |= {"decoder_start_token_id": tokens["bos_token_id"], "max_new_tokens": longest}
    nobody = list(range(vocabulary_size(tokenizer), config.model.vocab_size or 0))
    # Beams are weighed by probabilities among the words that there are, as ours are.
    return settings | ({"suppress_tokens": nobody, "renormalize_logits": True} if nobody else {})


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_bytes(as_utf8(json.dumps(data, indent=2, ensure_ascii=False) + "\n"))
