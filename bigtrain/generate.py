"""Write on from a prompt, or translate it, with the newest checkpoint of a run."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bigtrain import config as configuration
from bigtrain import models
from bigtrain.checkpoint import inference, newest
from bigtrain.compress.quantize import as_trained
from bigtrain.config import Config, HuggingFaceConfig, InstructionConfig, ModelConfig, TranslationConfig
from bigtrain.data.control import text_reader
from bigtrain.data.encode_examples import TranslationEncoder, translation_marks
from bigtrain.data.encode_instructions import Chat
from bigtrain.data.tokenizer import begin_id, load_tokenizer, vocabulary_size
from bigtrain.errors import ConfigError
from bigtrain.hints import WRITERS

logger = logging.getLogger(__name__)

BATCH = 16  # prompts written on at a time
Closed = Callable[[list[int]], bool]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Written:
    """What a model made of a prompt."""

    prompt: str
    text: str  # what it wrote alone: what follows the prompt, its translation, its answer
    tokens: int  # that it wrote for that
    finish_reason: Literal["stop", "length", "blank"]  # it ended the text; was cut short; there was nothing to read

    def shown(self, continues: bool) -> str:
        """As a reader wants it: a continuation with what it continues."""
        return self.prompt + self.text if continues and self.finish_reason != "blank" else self.text

    def as_json(self) -> dict[str, Any]:
        names = ("prompt", "text", "tokens", "finish_reason")
        return {name: getattr(self, name) for name in names}


def run(run: Path, prompts: list[str], **options: Any) -> list[str]:
    """What `write` makes of each prompt; of a model that continues a text together with the prompt."""
    written, continues = write(run, prompts, **options)
    return [one.shown(continues) for one in written]


def write(
    run: Path,
    prompts: list[str],
    *,
    skip_blank: bool = False,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    seed: int = 0,
    device: str = "auto",
    max_memory: dict[str, str] | None = None,
) -> tuple[list[Written], bool]:
    """What the model of run directory `run` writes after each prompt, to the end of the document at most; and whether
    it continues the prompts. An encoder-decoder translates them, a model that was trained to answer (task=instruction)
    answers them. With `skip_blank` nothing is made of a blank prompt.

    temperature 0 takes the likeliest token (greedy, or with num_beams > 1 beam search); above 0 it samples, from the
    top_k likeliest tokens and the likeliest that make up probability top_p (arXiv 1904.09751). The same arguments and
    prompts give the same text. A prompt that leaves too little of the model's context is shortened at its beginning.
    Raises ConfigError for what is no run, has no checkpoint, a number out of range, or a prompt that is no text.
    """
    check_options(max_new_tokens, temperature, top_k, top_p, num_beams)
    for prompt in prompts:
        check_text(prompt)
    config = configuration.load(run / "config.yaml")
    if config.task.kind not in WRITERS:
        raise ConfigError("RUN", str(run), f"holds a model for {config.task.kind}, which does not write text")
    checkpoint = newest(run)
    if checkpoint is None:
        raise ConfigError("RUN", str(run), "holds no complete checkpoint", "train until the first one is saved")
    tokenizer, eos_id = load_tokenizer(str(run / "tokenizer"), "RUN")
    model, where = inference.load(
        lambda: as_trained(build(config.model, config.task.kind), config, checkpoint), checkpoint, device, max_memory
    )
    options: dict[str, Any] = {"num_beams": num_beams, "do_sample": temperature > 0}
    if temperature > 0:  # top_k 0 and top_p 1 are no restriction; transformers would take 50
        options |= {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
    torch.manual_seed(seed)
    places = [place for place, prompt in enumerate(prompts) if prompt.strip() or not skip_blank]
    asked = [prompts[place] for place in places]
    written = [Written(prompt, "", 0, "blank") for prompt in prompts]
    task = config.task
    if isinstance(task, TranslationConfig):
        found = write_translations(model, asked, tokenizer, config, max_new_tokens, options, where)
    elif isinstance(task, InstructionConfig):
        found = _answers(model, asked, tokenizer, eos_id, task.template, max_new_tokens, options, where)
    else:
        found = _continuations(model, asked, tokenizer, eos_id, max_new_tokens, options, where)
    for place, one in zip(places, found, strict=True):
        written[place] = one
    return written, task.kind == "causal_lm"


def check_text(prompt: str) -> None:
    """Raises ConfigError for half a character or bytes that are no UTF-8, which Python keeps as surrogates."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        begin = max(error.start - 20, 0)
        raise ConfigError(
            "prompt", prompt[begin : error.end], "is not UTF-8 text", "convert it: iconv -t utf-8"
        ) from None


def _continuations(
    model: Any,
    prompts: list[str],
    tokenizer: Any,
    eos_id: int,
    max_new_tokens: int,
    options: dict[str, Any],
    device: torch.device,
) -> list[Written]:
    # They begin as training began its documents.
    reader = text_reader(tokenizer)
    encoded = [[begin_id(tokenizer), *reader.encode(prompt, add_special_tokens=False).ids] for prompt in prompts]
    rows = write_on(model, encoded, eos_id, vocabulary_size(tokenizer), max_new_tokens, options, device)
    return [
        Written(
            prompt, following(tokenizer, before, row), len(row),
            "stop" if len(row) < room_after(before, max_new_tokens, model.config.max_seq_len) else "length",
        )
        for prompt, before, row in zip(prompts, encoded, rows, strict=True)
    ]  # fmt: skip


def following(tokenizer: Any, before: list[int], tokens: list[int]) -> str:
    """The text of `tokens` where they follow `before`: alone they may lose a blank at their beginning, or half of a
    character or word."""
    for known in (before, before[-1:]):
        begun = tokenizer.decode(known, skip_special_tokens=True)
        whole: str = tokenizer.decode(known + tokens, skip_special_tokens=True)
        if whole.startswith(begun):
            return whole[len(begun) :]
    alone: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return alone


def _answers(
    model: Any,
    prompts: list[str],
    tokenizer: Any,
    eos_id: int,
    template: str,
    max_new_tokens: int,
    options: dict[str, Any],
    device: torch.device,
) -> list[Written]:
    chat = Chat(template, tokenizer)
    encoded = [chat.prompt(prompt).ids for prompt in prompts]
    closed: Closed | None = None
    if chat.closing is not None:
        closed = partial(_ends_in, chat.closing)
    elif chat.closing_text:
        closed = partial(_ends_with, tokenizer, chat.closing_text)
    rows = write_on(model, encoded, eos_id, vocabulary_size(tokenizer), max_new_tokens, options, device, closed)
    written = []
    for prompt, before, row in zip(prompts, encoded, rows, strict=True):
        ended = len(row) < room_after(before, max_new_tokens, model.config.max_seq_len) or bool(closed and closed(row))
        answer = row[:-1] if row and row[-1] == chat.closing else row
        text = _before(chat.closing_text, tokenizer.decode(answer, skip_special_tokens=True))
        written.append(Written(prompt, text, len(row), "stop" if ended else "length"))
    return written


def _ends_in(token: int, tokens: list[int]) -> bool:
    return tokens[-1:] == [token]


def _ends_with(tokenizer: Any, mark: str, tokens: list[int]) -> bool:
    """Whether the last of `tokens` completes `mark`, which may be one token or be spelled in several."""
    return mark in tokenizer.decode(tokens[-len(mark.encode()) :], skip_special_tokens=False)


def _before(mark: str, text: str) -> str:
    return text.partition(mark)[0] if mark else text


def check_options(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, num_beams: int
) -> None:
    """Raises ConfigError for a number out of range, or one that would have no effect."""
    for name, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams), ("top_k", top_k)):
        if value is not None and value < 1:
            raise ConfigError(name, value, "must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ConfigError("temperature", temperature, "must be at least 0")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError("top_p", top_p, "must be above 0 and at most 1")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ConfigError(
            "temperature", temperature, "takes the likeliest token, so top_k and top_p have no effect",
            "set it above 0, 1.0 for the model's own probabilities",
        )  # fmt: skip


def build(config: ModelConfig, task: str) -> nn.Module:
    """The model of a run that writes text."""
    if not isinstance(config, HuggingFaceConfig):
        return models.build(config)
    with quiet():
        from bigtrain.models.huggingface import auto
    return auto.Seq2Seq(config) if task == "translation" else auto.CausalLM(config)


@torch.inference_mode()
def write_translations(
    model: nn.Module,
    sources: list[str],
    tokenizer: Any,
    config: Config,
    max_new_tokens: int,
    options: dict[str, Any],
    device: torch.device = CPU,
) -> list[Written]:
    """What the model makes of each source; one that is too long is cut as in training, and a warning says so."""
    with quiet():
        from bigtrain.models.generation import translate

    assert isinstance(config.task, TranslationConfig)
    special, layers = translation_marks(tokenizer, config.model), models.decoder_layers(model)
    encoder = TranslationEncoder(config.task, tokenizer, config.model)
    made: list[Written] = []
    for begin in range(0, len(sources), BATCH):
        batch = sources[begin : begin + BATCH]
        encoded = encoder.sources(batch)
        length = max(map(len, encoded))
        tokens = torch.tensor([row + [special["pad"]] * (length - len(row)) for row in encoded], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in encoded], device=device)
        written = translate(
            model, layers, model(tokens, mask), mask, special, vocabulary_size(tokenizer), max_new_tokens, options
        )
        for source, row, text in zip(batch, written, tokenizer.decode_batch(written), strict=True):
            made.append(Written(source, text, len(row), "stop" if len(row) < max_new_tokens else "length"))
    if encoder.cut:
        logger.warning("%d sources were cut: the model reads %d tokens", encoder.cut, encoder.length)
    return made


def write_on(
    decoder: Any,
    prompts: list[list[int]],
    eos_id: int,
    vocab_size: int,
    max_new_tokens: int,
    options: dict[str, Any],
    device: torch.device = CPU,
    closed: Closed | None = None,
) -> list[list[int]]:
    """The new tokens after each of `prompts`, the closing eos_id not among them. `options`: of GenerationConfig.
    `closed` tells of new tokens whether they are the whole text though no eos_id follows.

    Prompts of one batch may write equally many tokens, so that none gets fewer than it would alone.
    """
    fitted = [fit(prompt, max_new_tokens, decoder.config.max_seq_len) for prompt in prompts]
    by_room = defaultdict(list)
    for index, (_, room) in enumerate(fitted):
        by_room[room].append(index)
    written: list[list[int]] = [[] for _ in prompts]
    for room, same in by_room.items():
        for indices in (same[start : start + BATCH] for start in range(0, len(same), BATCH)):
            batch = [fitted[index][0] for index in indices]
            for index, tokens in zip(
                indices, _generate(decoder, batch, eos_id, vocab_size, room, options, device, closed), strict=True
            ):
                written[index] = tokens
    return written


def fit(prompt: list[int], max_new_tokens: int, max_seq_len: int) -> tuple[list[int], int]:
    """(prompt, tokens to write) that the context holds; a warning says what was cut.

    A prompt is only shortened as far as half the context: then it is the new tokens that get fewer.
    """
    kept = prompt[-_most_kept(max_new_tokens, max_seq_len) :]
    room = room_after(prompt, max_new_tokens, max_seq_len)
    if len(kept) < len(prompt):
        logger.warning(
            "the prompt's last %d of %d tokens are used: the model's context is %d", len(kept), len(prompt), max_seq_len
        )
    if room < max_new_tokens:
        logger.warning("at most %d tokens are written: the model's context is %d", room, max_seq_len)
    return kept, room


def room_after(prompt: list[int], max_new_tokens: int, max_seq_len: int) -> int:
    """Tokens that may be written after what `fit` leaves of a prompt."""
    return min(max_new_tokens, max_seq_len - min(len(prompt), _most_kept(max_new_tokens, max_seq_len)))


def _most_kept(max_new_tokens: int, max_seq_len: int) -> int:
    return max(max_seq_len - max_new_tokens, max_seq_len // 2, 1)


@torch.inference_mode()
def _generate(
    decoder: Any,
    prompts: list[list[int]],
    eos_id: int,
    vocab_size: int,
    max_new_tokens: int,
    options: dict[str, Any],
    device: torch.device,
    closed: Closed | None,
) -> list[list[int]]:
    with quiet():
        from transformers import GenerationConfig, StoppingCriteriaList

        from bigtrain.models.generation import DecoderForGeneration

    tokens, mask = pad_left(prompts, eos_id, device)
    settings = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=eos_id, pad_token_id=eos_id, **options)
    if isinstance(decoder, models.Decoder):
        model: Any = DecoderForGeneration(decoder, vocab_size)
    else:  # transformers' own; words that do not exist are never written
        model = decoder.model
        settings.suppress_tokens = list(range(vocab_size, decoder.config.vocab_size)) or None
    begin, criteria = tokens.size(1), StoppingCriteriaList()
    if closed is not None:
        is_closed = closed  # for mypy: a closure forgets that it is not None

        def stop(rows: Tensor, scores: Any, **unused: Any) -> Tensor:
            return torch.tensor([is_closed(row) for row in rows[:, begin:].tolist()], device=rows.device)

        criteria.append(stop)
    output = model.generate(tokens, attention_mask=mask, generation_config=settings, stopping_criteria=criteria)
    output = output[:, begin:].tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in output]


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings while a library is imported: torchao, which transformers loads, has several for every machine."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def pad_left(prompts: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(tokens, attention mask), each (B, T) int64: prompts end in the last column, the mask is 0 before they begin."""
    length = max(map(len, prompts))
    tokens = [[pad_id] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)
