"""Labelled records -> examples of token ids, one encoder per kind of task. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from bigtrain.config import (
    ClassificationConfig,
    Config,
    HuggingFaceConfig,
    InstructionConfig,
    ModelConfig,
    QuestionAnsweringConfig,
    TaggingConfig,
    TaskConfig,
    TranslationConfig,
)
from bigtrain.data.control import text_reader
from bigtrain.data.encode_instructions import InstructionEncoder
from bigtrain.data.encode_questions import QuestionEncoder
from bigtrain.data.examples import Example
from bigtrain.data.records import Record
from bigtrain.data.tokenizer import require_special, special_ids
from bigtrain.errors import ConfigError

NOT_SCORED = -100  # the tag of a token that is not the first of its word


class ExampleEncoder(Protocol):
    """What a task makes of its records."""

    cut: int  # records that were longer than the model's sequences, so far

    def notes(self) -> list[str]:
        """What was lost or left out so far, and what a reader of the result should know: a sentence each."""
        ...

    def labels_of(self, record: Record) -> list[str]:
        """The labels that a record holds."""
        ...

    def encode(self, records: Sequence[Record], label_ids: dict[str, int]) -> list[list[Example]]:
        """Each record's examples: one, or where it is too long for the model perhaps several.

        Raises ConfigError for a label that is not in `label_ids`.
        """
        ...


def record_kind(task: TaskConfig) -> str:
    """The kind of record that a task wants, as bigtrain.data.records has them."""
    if isinstance(task, TranslationConfig):
        return "seq2seq"
    return "regression" if isinstance(task, ClassificationConfig) and task.regression else task.kind


def example_encoder(config: Config, tokenizer: Any) -> ExampleEncoder:
    if isinstance(config.task, InstructionConfig):
        require_special(special_ids(tokenizer), ("eos",), config.data.tokenizer.path)
        return InstructionEncoder(config.task, tokenizer, config.model.max_seq_len)
    if isinstance(config.task, TranslationConfig):
        return TranslationEncoder(config.task, tokenizer, config.model)
    if isinstance(config.task, TaggingConfig):
        return TaggingEncoder(config.task, tokenizer, config.model.max_seq_len)
    if isinstance(config.task, QuestionAnsweringConfig):
        return QuestionEncoder(config.task, tokenizer, config.model.max_seq_len)
    assert isinstance(config.task, ClassificationConfig)
    return ClassificationEncoder(config.task, tokenizer, config.model.max_seq_len)


def _label_id(label: str, label_ids: dict[str, int]) -> int:
    if label not in label_ids:
        known = ", ".join(label_ids)
        raise ConfigError("data.held_out_path", label, "a label that no training example has", f"known are {known}")
    return label_ids[label]


def _cut_note(encoder: Any, what: str) -> list[str]:
    lost = f"{encoder.cut} {what} longer than {encoder.length} tokens lost their end"
    return [f"{lost}; raise model.max_seq_len or task.max_length"] if encoder.cut else []


class ClassificationEncoder:
    """A text, or two, between the tokenizer's own special tokens; one label, or a number."""

    def __init__(self, task: ClassificationConfig, tokenizer: Any, max_seq_len: int) -> None:
        self.regression, self.tokenizer = task.regression, text_reader(tokenizer)
        self.length, self.cut = min(task.max_length or max_seq_len, max_seq_len), 0

    def notes(self) -> list[str]:
        return _cut_note(self, "texts")

    def labels_of(self, record: Record) -> list[str]:
        return [] if self.regression else [record["label"]]

    def encode(self, records: Sequence[Record], label_ids: dict[str, int]) -> list[list[Example]]:
        pairs = "text_pair" in records[0]  # all of them have one, or none: the reader has looked
        texts = [(record["text"], record["text_pair"]) if pairs else record["text"] for record in records]
        self.tokenizer.enable_truncation(self.length, strategy="longest_first")
        examples: list[list[Example]] = []
        for record, encoding in zip(records, self.tokenizer.encode_batch(texts), strict=True):
            self.cut += bool(encoding.overflowing)
            example: Example = {"tokens": encoding.ids}
            if pairs:
                example["token_types"] = encoding.type_ids
            example["label"] = float(record["label"]) if self.regression else _label_id(record["label"], label_ids)
            examples.append([example])
        return examples


class TaggingEncoder:
    """Words with a tag each; a word's first token carries it. A sentence that is too long becomes several examples."""

    def __init__(self, task: TaggingConfig, tokenizer: Any, max_seq_len: int) -> None:
        self.tokenizer, self.unknown = text_reader(tokenizer), special_ids(tokenizer).get("unk", 0)
        self.length, self.cut = min(task.max_length or max_seq_len, max_seq_len), 0

    def notes(self) -> list[str]:
        return []  # what is longer becomes several examples

    def labels_of(self, record: Record) -> list[str]:
        return list(record["tags"])

    def encode(self, records: Sequence[Record], label_ids: dict[str, int]) -> list[list[Example]]:
        self.tokenizer.no_truncation()
        # Byte-level tokenizers tell a word from a part of one by the space before it.
        sentences = [[f" {word}" if i else word for i, word in enumerate(record["words"])] for record in records]
        encodings = self.tokenizer.encode_batch(sentences, is_pretokenized=True)
        return [
            self._examples(record["tags"], encoding, label_ids)
            for record, encoding in zip(records, encodings, strict=True)
        ]

    def _examples(self, tags: list[str], encoding: Any, label_ids: dict[str, int]) -> list[Example]:
        special = [i for i, mask in enumerate(encoding.special_tokens_mask) if mask]
        before = [encoding.ids[i] for i in special if i == 0]
        after = [encoding.ids[i] for i in special if i != 0]
        room = self.length - len(before) - len(after)
        tokens: list[int] = []
        targets: list[int] = []
        examples: list[Example] = []

        def finish() -> None:
            ignored = [NOT_SCORED] * len(after)
            examples.append(
                {"tokens": [*before, *tokens, *after], "targets": [NOT_SCORED] * len(before) + targets + ignored}
            )
            tokens.clear()
            targets.clear()

        words: dict[int, list[int]] = {}
        for i, (word, token) in enumerate(zip(encoding.word_ids, encoding.ids, strict=True)):
            if word is not None and i not in special:
                words.setdefault(word, []).append(token)
        for word, tag in enumerate(tags):
            # A word of nothing but control characters has no token: something must carry its tag.
            pieces = words.get(word, [self.unknown])[:room]
            if len(tokens) + len(pieces) > room:
                finish()
                self.cut += len(examples) == 1
            tokens += pieces
            targets += [_label_id(tag, label_ids), *[NOT_SCORED] * (len(pieces) - 1)]
        finish()
        return examples


class TranslationEncoder:
    """A source and a target, each between [CLS] and [SEP]: what the decoder starts from and ends with.

    Of a model of transformers each is between its tokenizer's own marks, a target after the decoder's start token too.
    """

    def __init__(self, task: TranslationConfig, tokenizer: Any, model: ModelConfig) -> None:
        self.tokenizer, self.cut = text_reader(tokenizer), 0
        self.length = min(task.max_length or model.max_seq_len, model.max_seq_len)
        marks = translation_marks(tokenizer, model)
        self.before, self.after, self.start = [marks["cls"]], [marks["sep"]], []
        if isinstance(model, HuggingFaceConfig):
            self.before, self.after = _own_marks(tokenizer)
            self.start = [marks["cls"]]
            if marks["sep"] not in self.after:
                self.after = [marks["sep"], *self.after]

    def notes(self) -> list[str]:
        return _cut_note(self, "sources or targets")

    def labels_of(self, record: Record) -> list[str]:
        return []

    def encode(self, records: Sequence[Record], label_ids: dict[str, int]) -> list[list[Example]]:
        sources, source_cuts = self._enclosed([record["source"] for record in records])
        targets, target_cuts = self._enclosed([record["target"] for record in records])
        self.cut += sum(map(max, source_cuts, target_cuts))
        return [
            [{"tokens": source, "target": self.start + target}] for source, target in zip(sources, targets, strict=True)
        ]

    def sources(self, texts: list[str]) -> list[list[int]]:
        """Sources without a target."""
        enclosed, cuts = self._enclosed(texts)
        self.cut += sum(cuts)
        return enclosed

    def _enclosed(self, texts: list[str]) -> tuple[list[list[int]], list[bool]]:
        """Each text's tokens, and whether some had to be left out."""
        self.tokenizer.no_truncation()
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        room = self.length - len(self.before) - len(self.after)
        return (
            [[*self.before, *encoding.ids[:room], *self.after] for encoding in encodings],
            [len(encoding.ids) > room for encoding in encodings],
        )


def translation_marks(tokenizer: Any, model: ModelConfig) -> dict[str, int]:
    """{cls: what a decoder starts from, sep: what it ends with, pad}.

    Raises ConfigError where a tokenizer and a model of transformers name no end of a text.
    """
    found = special_ids(tokenizer)
    if isinstance(model, HuggingFaceConfig):
        theirs = model.architecture
        end = theirs.get("eos_token_id")
        end = end[0] if isinstance(end, list) else end
        end = found.get("eos") if end is None else end
        if end is None:
            raise ConfigError(
                "data.tokenizer.path", model.path, "no end-of-text token in it or the model's config.json"
            )
        pad = theirs.get("pad_token_id")
        found |= {"cls": theirs["decoder_start_token_id"], "sep": end, "pad": end if pad is None else pad}
    return {name: found[name] for name in ("cls", "sep", "pad")}


def _own_marks(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    tokenizer.no_truncation()
    encoding = tokenizer.encode("a")
    own = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
    return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]
