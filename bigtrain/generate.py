"""Write on from a prompt, or translate it, with the newest checkpoint of a run."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

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

logger = logging.getLogger(__name__)

BATCH = 16  # prompts written on at a time
Closed = Callable[[list[int]], bool]
CPU = torch.device("cpu")


def run(
    run: Path,
    prompts: list[str],
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    seed: int = 0,
    device: str = "auto",
    max_memory: dict[str, str] | None = None,
) -> list[str]:
    """Each prompt with what the model of run directory `run` writes after it, to the end of the document at most.
    Of an encoder-decoder the prompt is the source, and the result is what it writes for that alone; of a model that was
    trained to answer (task=instruction) it is the answer alone.

    temperature 0 takes the likeliest token (greedy, or with num_beams > 1 beam search); above 0 it samples, from the
    top_k likeliest tokens and the likeliest that make up probability top_p (arXiv 1904.09751). The same arguments and
    prompts give the same text. A prompt that leaves too little of the model's context is shortened at its beginning.
    Raises ConfigError for what is no run, has no checkpoint, or a number out of range.
    """
    check_options(max_new_tokens, temperature, top_k, top_p, num_beams)
    config = configuration.load(run / "config.yaml")
    if config.task.kind not in ("causal_lm", "instruction", "translation"):
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
    if isinstance(config.task, TranslationConfig):
        return write_translations(model, prompts, tokenizer, config, max_new_tokens, options, where)
    answers = config.task if isinstance(config.task, InstructionConfig) else None
    size = vocabulary_size(tokenizer)
    if answers is None:  # as training began its documents
        reader = text_reader(tokenizer)
        encoded = [[begin_id(tokenizer), *reader.encode(prompt, add_special_tokens=False).ids] for prompt in prompts]
        written = write_on(model, encoded, eos_id, size, max_new_tokens, options, where)
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]
        return [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    chat = Chat(answers.template, tokenizer)
    encoded = [chat.prompt(prompt).ids for prompt in prompts]
    closed: Closed | None = None
    if chat.closing is not None:
        closed = partial(_ends_in, chat.closing)
    elif chat.closing_text:
        closed = partial(_ends_with, tokenizer, chat.closing_text)
    written = write_on(model, encoded, eos_id, size, max_new_tokens, options, where, closed)
    answered = [tokens[:-1] if tokens and tokens[-1] == chat.closing else tokens for tokens in written]
    return [_before(chat.closing_text, tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in answered]


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
) -> list[str]:
    """What the model makes of each source; one that is too long is cut as in training, and a warning says so."""
    with quiet():
        from bigtrain.models.generation import translate

    assert isinstance(config.task, TranslationConfig)
    special, layers = translation_marks(tokenizer, config.model), models.decoder_layers(model)
    encoder = TranslationEncoder(config.task, tokenizer, config.model)
    texts: list[str] = []
    for begin in range(0, len(sources), BATCH):
        encoded = encoder.sources(sources[begin : begin + BATCH])
        length = max(map(len, encoded))
        tokens = torch.tensor([row + [special["pad"]] * (length - len(row)) for row in encoded], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in encoded], device=device)
        written = translate(
            model, layers, model(tokens, mask), mask, special, vocabulary_size(tokenizer), max_new_tokens, options
        )
        texts += tokenizer.decode_batch(written)
    if encoder.cut:
        logger.warning("%d sources were cut: the model reads %d tokens", encoder.cut, encoder.length)
    return texts


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
    if len(prompt) + max_new_tokens <= max_seq_len:
        return prompt, max_new_tokens
    kept = prompt[-max(max_seq_len - max_new_tokens, max_seq_len // 2, 1) :]
    room = max_seq_len - len(kept)
    if len(kept) < len(prompt):
        logger.warning(
            "the prompt's last %d of %d tokens are used: the model's context is %d", len(kept), len(prompt), max_seq_len
        )
    if room < max_new_tokens:
        logger.warning("at most %d tokens are written: the model's context is %d", room, max_seq_len)
    return kept, room


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
