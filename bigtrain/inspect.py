"""Why a trained model said what it said of one text: token attributions and attention maps, as a page and pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain import config as configuration
from bigtrain import models
from bigtrain.attribution import Attribution, attention_of, attribute
from bigtrain.checkpoint import newest
from bigtrain.checkpoint.weights import load_into
from bigtrain.config import (
    CausalLMConfig,
    ClassificationConfig,
    Config,
    DecoderConfig,
    EncoderConfig,
    InstructionConfig,
    TaggingConfig,
)
from bigtrain.data.control import control_tokens, text_reader
from bigtrain.data.encode_instructions import Chat, Prompt
from bigtrain.data.tokenizer import (
    find_tokenizer,
    load_tokenizer,
    require_special,
    special_ids,
    vocabulary_size,
)
from bigtrain.errors import ConfigError, nearest
from bigtrain.export import labels as labels_of
from bigtrain.files import write_atomic
from bigtrain.models.heads import ClassificationHead, TaggingHead
from bigtrain.tasks.labelled import WithHead, build_encoder

logger = logging.getLogger(__name__)

MOST_TOKENS = 512  # of a text: maps of all heads grow with its square
TOLD = 10  # answers that are told with their probabilities


@dataclass(frozen=True)
class Text:
    """A text as the model reads it."""

    ids: list[int]
    pieces: list[str]  # what of the text each token is; of a special token its name
    words: list[int]  # which word each token is of, ascending; a special token is one of its own
    special: list[bool]
    types: list[int]  # segments


@dataclass(frozen=True)
class Inspection:
    """What was found; `attention` is (layers, heads, T, T), rows sum to 1: how a token's look is shared out."""

    text: Text
    question: str  # what the attributions explain
    answers: list[tuple[str, float]]  # likeliest first, with their probabilities; of a regression its number
    attribution: Attribution
    attention: Tensor
    at: int | None  # the token whose tag, or whose successor, is explained

    def by_word(self) -> list[tuple[str, float]]:
        """(word, attribution), in the order of the text: its tokens' sum. Special tokens have none."""
        found: dict[int, tuple[str, float]] = {}
        values = self.attribution.tokens.tolist()
        for piece, word, special, value in zip(
            self.text.pieces, self.text.words, self.text.special, values, strict=True
        ):
            if special:
                continue
            before, total = found.get(word, ("", 0.0))
            found[word] = before + piece, total + value
        return [(word.strip() or word, value) for word, value in found.values()]


def run(
    run: Path, text: str, *, pair: str | None = None, target: str | None = None, device: str = "auto",
    out: Path | None = None,
) -> tuple[Inspection, Path]:  # fmt: skip
    """Inspect what the newest checkpoint of `run` makes of `text`; write index.html, attribution.png, attention.png and
    inspection.json into `out` (by default RUN/inspection) and return its page.

    The score that is explained is the target's logit above the mean of all: of a classifier's label (by default the one
    it gives), of a tag at the word where it is likeliest (by default that of the surest entity), of the next token
    (by default the likeliest); a regression's is its number. Attributions begin at the same text with all its tokens
    replaced by padding, the mask or the unknown token, whichever leaves the model most undecided (of a causal model by
    the end of text).
    Raises ConfigError for what is no run, has no checkpoint or is of another task, an empty text, or no such target.
    """
    from bigtrain.inspect_page import write_page

    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", device, "no CUDA device here", "take cpu or auto")
    for name, given in (("text", text), ("pair", pair)):
        if given is not None and not given.strip():
            raise ConfigError(name, given, "empty")
    config = configuration.load(run / "config.yaml")
    explained = (ClassificationConfig, TaggingConfig, CausalLMConfig, InstructionConfig)
    if not isinstance(config.task, explained) or not isinstance(config.model, (EncoderConfig, DecoderConfig)):
        raise ConfigError(
            "RUN", str(run), f"is of task={config.task.kind} with a model of kind {config.model.kind}",
            "inspected are classification, tagging, causal_lm and instruction",
        )  # fmt: skip
    if pair is not None and not isinstance(config.task, ClassificationConfig):
        raise ConfigError("pair", pair, f"RUN's task is {config.task.kind}, which reads one text")
    checkpoint = newest(run)
    if checkpoint is None:
        raise ConfigError("RUN", str(run), "holds no complete checkpoint", "train until the first one is saved")
    labels = labels_of(run, config) or []
    model = load_model(config, labels, checkpoint, where)
    if isinstance(config.model, DecoderConfig):
        found = _inspect_decoder(model, config, run, text, target)
    else:
        found = _inspect_encoder(model, config, labels, run, text, pair, target)
    out = out or run / "inspection"
    out.mkdir(parents=True, exist_ok=True)
    page = write_page(found, f"{run.name}, {checkpoint.name}", out)
    write_atomic(out / "inspection.json", json.dumps(as_dict(found), ensure_ascii=False, indent=1) + "\n")
    return found, page


def load_model(config: Config, labels: list[str], checkpoint: Path, device: torch.device) -> nn.Module:
    """The trained model in float32, which needs none of the data that it was trained on."""
    task, model = config.task, config.model
    with torch.device("meta"):  # draws no weights that the checkpoint's would overwrite
        built: Any
        if isinstance(task, ClassificationConfig):
            backbone = build_encoder(model, pooled=True)
            outputs = 1 if task.regression else len(labels)
            built = WithHead(backbone, ClassificationHead(backbone.config, outputs, task.dropout), pooled=True)
        elif isinstance(task, TaggingConfig):
            backbone = build_encoder(model, pooled=False)
            built = WithHead(backbone, TaggingHead(backbone.config, len(labels), task.dropout), pooled=False)
        else:
            assert isinstance(model, DecoderConfig)
            built = models.build(model)
    built.to(torch.float32).to_empty(device=device)
    built.tie_weights()
    load_into(built, checkpoint)
    loaded: nn.Module = built.eval().requires_grad_(False)
    return loaded


# ------------------------------------------------------------------------------------------------- encoders


def _inspect_encoder(
    model: Any, config: Config, labels: list[str], run: Path, text: str, pair: str | None, target: str | None
) -> Inspection:
    task = config.task
    assert isinstance(task, (ClassificationConfig, TaggingConfig))
    tokenizer = find_tokenizer(str(run / "tokenizer"), "RUN")
    special = special_ids(tokenizer)
    require_special(special, ("pad",), "RUN")
    length = min(task.max_length or config.model.max_seq_len, config.model.max_seq_len, MOST_TOKENS)
    if isinstance(task, TaggingConfig):
        read = read_words(tokenizer, text, length)
    else:
        read = read_text(tokenizer, text, pair, length)
    wanted = _label(target, labels)
    tokens, types = _tensors(model, read.ids, read.types)
    with torch.no_grad(), attention_of(model) as attention:
        logits = model(tokens, None, types)[0]
    at = None
    if isinstance(task, TaggingConfig):
        at, wanted = _tag(logits, read, labels, wanted)
        logits = logits[at]
    chosen = int(logits.argmax()) if wanted is None else wanted
    regression = isinstance(task, ClassificationConfig) and task.regression

    def score(tokens: Tensor, types: Tensor) -> Tensor:
        outputs = model(tokens, None, types)
        outputs = outputs if at is None else outputs[:, at]
        return outputs[:, 0] if regression else outputs[:, chosen] - outputs.mean(-1)

    own = torch.tensor([read.special], device=tokens.device)
    blanks = [tokens.where(own, special[name]) for name in ("pad", "mask", "unk") if name in special]
    with torch.no_grad():
        baseline = min(blanks, key=lambda blank: abs(float(score(blank, types))))
    attribution = attribute(score, model.backbone.embedding, tokens, baseline, types)
    if attribution.baseline > abs(attribution.score) / 2 and not regression:
        logger.warning("the model says so of an empty text too: the attributions tell only what speaks beyond that")
    if regression:
        answers, question = [("number", float(logits[0]))], "the number"
    else:
        answers = _likeliest(logits, labels.__getitem__)
        word = "" if at is None else f" at {_word_at(read, at)!r}"
        question = f"the label {labels[chosen]!r}{word}"
    return Inspection(read, question, answers, attribution, torch.cat(attention), at)


def _label(target: str | None, labels: list[str]) -> int | None:
    if target is None:
        return None
    if target not in labels:
        if not labels:
            raise ConfigError("target", target, "RUN's model gives a number, not one of several labels")
        near = nearest(target, labels)
        way_out = f"did you mean {near}?" if near else f"one of {', '.join(labels)}"
        raise ConfigError("target", target, "RUN's model has no such label", way_out)
    return labels.index(target)


def _tag(logits: Tensor, read: Text, labels: list[str], wanted: int | None) -> tuple[int, int]:
    """(token, tag) to explain: the wanted tag where it is likeliest, else the surest tag that is not O."""
    first = [i for i, word in enumerate(read.words) if not read.special[i] and (i == 0 or read.words[i - 1] != word)]
    probabilities = logits[first].softmax(-1)
    if wanted is not None:
        return first[int(probabilities[:, wanted].argmax())], wanted
    best, tags = probabilities.max(-1)
    entity = torch.tensor([labels[tag] != "O" for tag in tags.tolist()], device=best.device)
    row = int((best + entity).argmax())
    return first[row], int(tags[row])


def _word_at(read: Text, token: int) -> str:
    same = [piece for piece, word in zip(read.pieces, read.words, strict=True) if word == read.words[token]]
    return "".join(same).strip()


def read_text(tokenizer: Any, text: str, pair: str | None, length: int) -> Text:
    """A text, or two, as a classifier was trained on them; what is too long is cut, and a warning says so."""
    reader = text_reader(tokenizer)
    reader.enable_truncation(length, strategy="longest_first")
    encoding = reader.encode(text, pair) if pair is not None else reader.encode(text)
    if encoding.overflowing:
        logger.warning("the text was cut: the model reads %d tokens", length)
    sources = {0: text, 1: pair or ""}
    pieces = [
        token if special or sequence is None else sources[sequence][begin:end] or token
        for token, special, sequence, (begin, end) in zip(
            encoding.tokens, encoding.special_tokens_mask, encoding.sequence_ids, encoding.offsets, strict=True
        )
    ]
    return _text(encoding, pieces, list(zip(encoding.sequence_ids, encoding.word_ids, strict=True)))


def read_words(tokenizer: Any, text: str, length: int) -> Text:
    """Words parted by spaces, as a tagger was trained on them."""
    words = text.split()
    reader = text_reader(tokenizer)
    reader.enable_truncation(length)
    # Byte-level tokenizers tell a word from a part of one by the space before it.
    spaced = [f" {word}" if i else word for i, word in enumerate(words)]
    encoding = reader.encode(spaced, is_pretokenized=True)
    if encoding.overflowing:
        logger.warning("the text was cut: the model reads %d tokens", length)
    pieces = [
        token if special or word is None else spaced[word][begin:end] or token
        for token, special, word, (begin, end) in zip(
            encoding.tokens, encoding.special_tokens_mask, encoding.word_ids, encoding.offsets, strict=True
        )
    ]
    return _text(encoding, pieces, list(encoding.word_ids))


def _text(encoding: Any, pieces: list[str], keys: list[Any]) -> Text:
    """keys: equal for the tokens of one word."""
    special = [bool(mask) for mask in encoding.special_tokens_mask]
    numbers: list[int] = []
    for i, key in enumerate(keys):
        same = i > 0 and not special[i] and not special[i - 1] and key == keys[i - 1]
        numbers.append(numbers[-1] + (not same) if numbers else 0)
    return Text(encoding.ids, pieces, numbers, special, encoding.type_ids)


# ------------------------------------------------------------------------------------------------- decoders


def _inspect_decoder(model: Any, config: Config, run: Path, text: str, target: str | None) -> Inspection:
    tokenizer, eos_id = load_tokenizer(str(run / "tokenizer"), "RUN")
    length = min(config.model.max_seq_len, MOST_TOKENS)
    if isinstance(config.task, InstructionConfig):
        chat = Chat(config.task.template, tokenizer)
        read = _read(chat.prompt(text), len(chat.begin), length)
    else:
        read = read_prompt(tokenizer, text, [eos_id], length)
    size = vocabulary_size(tokenizer)
    (tokens,) = _tensors(model, read.ids)
    with torch.no_grad(), attention_of(model) as attention:
        logits = _next(model, tokens)[0, :size]
    chosen = int(logits.argmax()) if target is None else _token(tokenizer, target)

    def score(tokens: Tensor) -> Tensor:
        outputs = _next(model, tokens)[:, :size]
        return outputs[:, chosen] - outputs.mean(-1)

    attribution = attribute(score, model.embedding, tokens, torch.full_like(tokens, eos_id))

    def name(token: int) -> str:
        return tokenizer.decode([token]) or tokenizer.id_to_token(token)

    question = f"{name(chosen)!r} as the next token"
    answers = _likeliest(logits, name)
    return Inspection(read, question, answers, attribution, torch.cat(attention), len(read.ids) - 1)


def _next(model: Any, tokens: Tensor) -> Tensor:
    """Logits (B, V) of the token after the last."""
    logits: Tensor = model.head(model.forward_hidden(tokens)[:, -1])
    return logits


def read_prompt(tokenizer: Any, text: str, begin: list[int], length: int) -> Text:
    """A prompt as a document begins; of what is too long the end is kept, and a warning says so."""
    encoding = text_reader(tokenizer).encode(text, add_special_tokens=False)
    pieces = [text[start:end] or token for token, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True)]
    marks = [tokenizer.id_to_token(number) for number in begin]
    prompt = Prompt([*begin, *encoding.ids], marks + pieces, [None] * len(begin) + list(encoding.word_ids))
    return _read(prompt, len(begin), length)


def _read(prompt: Prompt, begin: int, length: int) -> Text:
    """A prompt, of which the first `begin` tokens begin the text, cut at its beginning to `length` tokens."""
    over = max(0, len(prompt.ids) - length)
    if over:
        count = len(prompt.ids) - begin
        logger.warning("the text's last %d of %d tokens are read", count - over, count)
    ids, pieces, keys = (
        [*values[:begin], *values[begin + over :]] for values in (prompt.ids, prompt.pieces, prompt.words)
    )
    words = [1]
    for before, key in pairwise(keys[begin:]):
        words.append(words[-1] + (key != before))
    special = [True] * begin + [False] * (len(ids) - begin)
    return Text(ids, pieces, [0] * begin + words, special, [0] * len(special))


def _token(tokenizer: Any, target: str) -> int:
    if target in control_tokens(tokenizer):
        return int(tokenizer.token_to_id(target))
    encoding = tokenizer.encode(target, add_special_tokens=False)
    if len(encoding.ids) != 1:
        parts = ", ".join(repr(tokenizer.decode([number])) for number in encoding.ids)
        raise ConfigError("target", target, f"is {len(encoding.ids)} tokens ({parts})", "one token is explained")
    return int(encoding.ids[0])


# --------------------------------------------------------------------------------------------------- common


def _tensors(model: nn.Module, *rows: list[int]) -> tuple[Tensor, ...]:
    device = next(model.parameters()).device
    return tuple(torch.tensor([row], device=device) for row in rows)


def _likeliest(logits: Tensor, name: Callable[[int], str]) -> list[tuple[str, float]]:
    probabilities, order = logits.softmax(-1).sort(descending=True)
    return [(name(int(i)), float(p)) for p, i in zip(probabilities[:TOLD], order[:TOLD], strict=True)]


def as_dict(found: Inspection) -> dict[str, Any]:
    """inspection.json: all but the maps, which the pictures show."""
    text, attribution = found.text, found.attribution
    return {
        "explained": found.question,
        "answers": [{"answer": answer, "probability": share} for answer, share in found.answers],
        "score": attribution.score,
        "baseline_score": attribution.baseline,
        "convergence_delta": attribution.delta,
        "steps": attribution.steps,
        "tokens": [
            {"token": piece, "word": word, "attribution": value}
            for piece, word, value in zip(text.pieces, text.words, attribution.tokens.tolist(), strict=True)
        ],
        "words": [{"word": word, "attribution": value} for word, value in found.by_word()],
    }


def summary(found: Inspection, count: int = 5) -> str:
    """A few lines for the console."""
    attribution = found.attribution
    strongest = sorted(found.by_word(), key=lambda pair: -abs(pair[1]))[:count]
    return "\n".join([
        f"explained: {found.question}",
        "answers:   " + ", ".join(f"{answer!r} {share:.3f}" for answer, share in found.answers[:count]),
        "words:     " + ", ".join(f"{word!r} {value:+.3g}" for word, value in strongest),
        f"score {attribution.score:.4f}, of the empty text {attribution.baseline:.4f}; convergence delta "
        f"{attribution.delta:+.4f} after {attribution.steps} steps",
    ])  # fmt: skip
