"""Questions on a context -> windows of token ids, with the way back from a token to the context's characters.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bigtrain.config import QuestionAnsweringConfig
from bigtrain.data.control import text_reader
from bigtrain.data.examples import Example
from bigtrain.data.records import Record
from bigtrain.data.tokenizer import special_ids
from bigtrain.errors import ConfigError


class QuestionEncoder:
    """Question and context by the tokenizer's own template for pairs; a context that is too long is cut into windows,
    each an example, of which two that follow one another share `task.stride` tokens (arXiv 1810.04805's SQuAD runs).

    Fields of an example:

    - tokens, token_types;
    - start, end: the positions of the answer's first and last token, of [CLS] where the window does not hold a whole
      answer or there is none, as in BERT's run_squad.py;
    - context_at: the position of the window's first context token;
    - char_begins, char_ends: for each context token of the window, the characters of the record's context that it is.

    Where a pair does not fit, a question longer than half of what is left beside the overlap loses its end: every
    window then brings at least as many new tokens of context as the question has.

    An answer of up to `task.stride` + 1 tokens is whole in some window, wherever it stands; `torn` counts the questions
    whose answers are longer and stand so that none is whole in any: to all of their windows there is no answer.

    `encode` raises ConfigError for a question all of whose answers are longer than a window's part of the context.
    """

    def __init__(self, task: QuestionAnsweringConfig, tokenizer: Any, max_seq_len: int) -> None:
        self.length = min(task.max_length or max_seq_len, max_seq_len)
        self.tokenizer, self.stride, self.cut, self.torn, self.shortened = text_reader(tokenizer), task.stride, 0, 0, 0
        self.cls_id = special_ids(tokenizer)["cls"]

    def notes(self) -> list[str]:
        found = []
        if self.torn:
            found.append(
                f"no window holds the whole answer to {self.torn} of the questions: it is longer than what two windows"
                f" share (task.stride={self.stride}); raise task.stride or task.max_length"
            )
        if self.shortened:
            found.append(
                f"{self.shortened} questions lost their end, to leave room for the context in {self.length} tokens;"
                " raise model.max_seq_len or task.max_length"
            )
        return found

    def labels_of(self, record: Record) -> list[str]:
        return []

    def encode(self, records: Sequence[Record], label_ids: dict[str, int]) -> list[list[Example]]:
        self.tokenizer.no_truncation()
        encodings = self.tokenizer.encode_batch([(record["question"], record["context"]) for record in records])
        return [self._windows(record, encoding) for record, encoding in zip(records, encodings, strict=True)]

    def _windows(self, record: Record, encoding: Any) -> list[Example]:
        whose = encoding.sequence_ids  # 0: the question's, 1: the context's, None: a special token
        question = [i for i, sequence in enumerate(whose) if sequence == 0]
        context = [i for i, sequence in enumerate(whose) if sequence == 1]
        fits = len(whose) <= self.length
        self.cut += not fits
        most = len(question) if fits else (self.length - (len(whose) - len(question) - len(context)) - self.stride) // 2
        lost = set(question[most:])
        self.shortened += bool(lost)
        border = context[0] if context else len(whose)
        before = [i for i in range(border) if i not in lost]
        after = [i for i in range(border, len(whose)) if whose[i] != 1]
        room = self.length - len(before) - len(after)
        spans = [span for answer in record["answers"] if (span := _tokens_of(answer, encoding.offsets, context))]
        if (shortest := min((last - first + 1 for first, last in spans), default=0)) > room:
            raise ConfigError(  # its windows would all teach that there is no answer
                "task.max_length", self.length,
                f"{record['id']}: its answer has {shortest} tokens, and a window has room for {room} of the context",
                "raise task.max_length (at most model.max_seq_len), or lower task.stride if the question is long",
            )  # fmt: skip
        examples: list[Example] = []
        whole = False  # in any window
        step = max(room - self.stride, 1)  # less than one only where the context fits, in one window
        for begin in range(0, max(len(context) - self.stride, 1), step):
            window = context[begin : begin + room]
            kept = [*before, *window, *after]
            tokens = [encoding.ids[i] for i in kept]
            cls = tokens.index(self.cls_id) if self.cls_id in tokens else 0
            held = [(first, last) for first, last in spans if begin <= first and last < begin + len(window)]
            first, last = held[0] if held else (0, 0)
            whole = whole or bool(held)
            offset = len(before) - begin
            examples.append(
                {
                    "tokens": tokens,
                    "token_types": [encoding.type_ids[i] for i in kept],
                    "start": first + offset if held else cls,
                    "end": last + offset if held else cls,
                    "context_at": len(before),
                    "char_begins": [encoding.offsets[i][0] for i in window],
                    "char_ends": [encoding.offsets[i][1] for i in window],
                }
            )
        self.torn += bool(spans) and not whole
        return examples


def _tokens_of(answer: dict[str, Any], offsets: list[tuple[int, int]], context: list[int]) -> tuple[int, int] | None:
    """(first, last) of the context's tokens that hold any character of the answer; None where the tokenizer has made
    none of it."""
    begin, end = answer["start"], answer["start"] + len(answer["text"])
    held = [number for number, i in enumerate(context) if offsets[i][0] < end and offsets[i][1] > begin]
    return (held[0], held[-1]) if held else None
