"""Labelled records -> examples in a cache directory, once per content, tokenizer and encoding.

Two passes over the records: the first collects the labels, the second encodes and writes. The directory is named by a
fingerprint of all that its bytes depend on, built as `<fingerprint>.partial` and renamed when it is whole.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from bigtrain.config import (
    ClassificationConfig,
    Config,
    DecoderConfig,
    HuggingFaceConfig,
    InstructionConfig,
    LabelledDataConfig,
    QuestionAnsweringConfig,
    StdlibDataConfig,
    TaggingConfig,
    TranslationConfig,
)
from bigtrain.data.encode_examples import ExampleEncoder, example_encoder, record_kind, translation_marks
from bigtrain.data.encode_instructions import chat_template
from bigtrain.data.examples import ENCODING, FORMAT, RECORDS, Example, ExampleWriter, PreparedExamples, load_examples
from bigtrain.data.left_out import say_and_record
from bigtrain.data.locks import locked, writing
from bigtrain.data.records import Record, Records, listed, open_records
from bigtrain.data.shards import META, SPLITS
from bigtrain.data.tokenizer import (
    CHATML,
    check_vocabulary,
    find_tokenizer,
    require_special,
    special_ids,
    tokenizer_identity,
    train_tokenizer,
    vocabulary_size,
)
from bigtrain.errors import ConfigError
from bigtrain.files import fsync, write_atomic

ENCODED_TOGETHER = 1000  # records
GAPS = ("nan", "<na>", "na", "n/a", "nat", "null")  # as pandas and others write them
MOST_SEEN = 100_000  # different labels: beyond it none is missed
# Fields of a task that no encoder reads: they are about the loss, batches or evaluation. Every other field is part of
# the cache's fingerprint, so that one that is added cannot reuse what was encoded without it.
NOT_ENCODED = frozenset({
    "label_smoothing", "dropout", "token_dropout", "token_swap", "token_deletion", "adversarial", "adversarial_epsilon",
    "adversarial_steps", "max_new_tokens", "num_beams", "max_answer_length", "no_answer_threshold",
})  # fmt: skip


def prepare_examples(config: Config) -> PreparedExamples:
    """Examples of `config.data` for `config.task`, from the cache if they are there.

    Raises ConfigError for records that cannot be read, a label that only the held-out part has, a tokenizer without
    the special tokens that the task needs, and a split without an example.
    """
    cache = Path(config.data.cache_dir).expanduser()
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        directory, records, loaded, marks = _find(config)
        if not directory.exists():
            with locked(directory.with_suffix(".lock"), config.logger.progress):
                if not directory.exists():
                    _build(directory, config, records, loaded, marks)
    say_and_record(records.left_out, directory)
    prepared = load_examples(directory)
    say(prepared.notes)
    check_vocabulary(config, prepared.vocab_size)
    for split in SPLITS:
        if not prepared.examples[split]:
            name = split.replace("_", "-")
            raise ConfigError(*_blame(config), f"its {name} part has no example", "give more, or change data.held_out")
    return prepared


def say(notes: Iterable[str], file: TextIO | None = None) -> None:
    """A line each on `file`, the terminal's standard output by default."""
    for note in notes:
        print(f"warning: {note}", file=file, flush=True)


def _may_grow(config: Config) -> bool:
    """Whether the tokenizer may get tokens that it has not: no weights are there yet whose rows they would need."""
    started = config.init_from is not None or isinstance(config.model, HuggingFaceConfig)
    return not started and config.compress.distil is None


def prepared_before(config: Config) -> Path | None:
    """Where `prepare_examples` has left the examples of `config`; None where it has not, and for what only a hub
    knows. Raises ConfigError for records or a tokenizer that cannot be read."""
    data, cache = config.data, Path(config.data.cache_dir).expanduser()
    paths = [getattr(data, name, None) or [] for name in ("path", "held_out_path")]
    named = [path for given in paths for path in ([given] if isinstance(given, str) else given)]
    if data.tokenizer.path:
        named.append(data.tokenizer.path)
    if not cache.is_dir() or not all(glob.has_magic(path) or Path(path).expanduser().exists() for path in named):
        return None
    directory, *_ = _find(config)
    return directory if directory.exists() else None


def _find(config: Config) -> tuple[Path, Records, Any | None, Sequence[str]]:
    """(where the examples are or would be, the records, the tokenizer if it is there already, marks
    of a chat's turns that it gets). Raises ConfigError as `prepare_examples`."""
    data = config.data
    assert isinstance(data, (LabelledDataConfig, StdlibDataConfig))
    cache = Path(data.cache_dir).expanduser()
    loaded = find_tokenizer(data.tokenizer.path) if data.tokenizer.path else None
    records = open_records(data, record_kind(config.task), cache)
    marks = CHATML if isinstance(config.task, InstructionConfig) and config.task.template == "chatml" else ()
    if loaded is not None and _may_grow(config):
        loaded.add_special_tokens(list(marks))
    identity = tokenizer_identity(data.tokenizer, loaded, _marks_texts(config), marks)
    if isinstance(config.task, InstructionConfig) and config.task.template == "tokenizer":
        identity["chat_template"] = chat_template(loaded)
    return cache / _fingerprint(config, records, identity), records, loaded, marks


def examples_at(config: Config) -> Path:
    """Where `prepare_examples` finds or leaves the examples: a directory named by the fingerprint of their content.

    Raises what that does.
    """
    cache = Path(config.data.cache_dir).expanduser()
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        return _find(config)[0]


def _marks_texts(config: Config) -> bool:
    """Whether the model's texts stand between BERT's marks; a decoder's end with the end-of-text token."""
    return not isinstance(config.model, DecoderConfig)


def _needed(config: Config) -> tuple[str, ...]:
    """Special tokens that the tokenizer must have. A model of transformers has its own around a text."""
    if isinstance(config.task, InstructionConfig):
        return ("eos",)
    if isinstance(config.model, HuggingFaceConfig):
        return ("cls",) if isinstance(config.task, QuestionAnsweringConfig) else ()
    return ("pad", "cls", "sep") if _marks_texts(config) else ("eos",)


def _fingerprint(config: Config, records: Records, tokenizer: dict[str, Any]) -> str:
    task = {key: value for key, value in asdict(config.task).items() if key not in NOT_ENCODED}
    parts = {
        "examples_format": FORMAT,
        "encoding": ENCODING,
        "records": records.identity(),
        "tokenizer": tokenizer,
        "task": task,
        "max_seq_len": config.model.max_seq_len,
    }
    if isinstance(config.model, HuggingFaceConfig):
        names = ("pad_token_id", "decoder_start_token_id", "eos_token_id")
        parts["special_ids"] = {name: config.model.architecture.get(name) for name in names}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _build(directory: Path, config: Config, records: Records, loaded: Any | None, marks: Sequence[str]) -> None:
    partial = directory.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed
    partial.mkdir()
    tokenizer = loaded
    if tokenizer is None:
        texts = (text for record, held_out in records if not held_out for text in _texts(record))
        tokenizer = train_tokenizer(
            texts, config.data.tokenizer.vocab_size, not isinstance(config.model, DecoderConfig), marks
        )
    fixed = isinstance(config.data, LabelledDataConfig) and config.data.held_out_path is not None
    labels = _labels(records, example_encoder(config, tokenizer), train_only=fixed)
    write_examples(partial, config, tokenizer, labels, records)
    partial.rename(directory)
    fsync(directory.parent)


def write_examples(directory: Path, config: Config, tokenizer: Any, labels: list[str], records: Records) -> list[str]:
    """Encode the records into `directory`. What was lost or left out on the way, a sentence each.

    Raises ConfigError, with the place, for a record that cannot be encoded, a label not of `labels` among them.
    """
    special = special_ids(tokenizer)
    require_special(special, _needed(config), config.data.tokenizer.path)
    if isinstance(config.model, HuggingFaceConfig) and isinstance(config.model.architecture.get("pad_token_id"), int):
        special["pad"] = config.model.architecture["pad_token_id"]
    if isinstance(config.model, HuggingFaceConfig) and isinstance(config.task, TranslationConfig):
        special |= translation_marks(tokenizer, config.model)
    special.setdefault("pad", special.get("eos", 0))  # of a decoder, which never looks at it
    encoder = example_encoder(config, tokenizer)
    label_ids = {label: number for number, label in enumerate(labels)}
    train, held_out = (ExampleWriter(directory, split) for split in SPLITS)
    seen = _Seen(config)
    numbers = [0, 0]  # of the next record in training, and held out
    with train, held_out, open(directory / RECORDS, "w", encoding="utf-8", errors="backslashreplace") as kept:
        for batch in _together(records):
            encoded = _encoded(encoder, [record for record, _ in batch], label_ids, records, sum(numbers))
            for (record, out), examples in zip(batch, encoded, strict=True):
                for example in examples:
                    (held_out if out else train).add(example | {"record": numbers[out]})
                seen.add(record, out)
                numbers[out] += 1
                if out:
                    kept.write(json.dumps(record, ensure_ascii=False) + "\n")
    notes = [*encoder.notes(), *seen.notes()]
    meta = {
        "examples_format": FORMAT,
        "fingerprint": directory.stem,
        "task": config.task.kind,
        "vocab_size": vocabulary_size(tokenizer),
        "special_ids": special,
        "labels": labels,
        "examples": {"train": train.count, "held_out": held_out.count},
        "ragged": train.ragged | held_out.ragged,
        "single": train.single | held_out.single,
        "cut": encoder.cut,
        "notes": notes,
    }
    write_atomic(directory / "tokenizer.json", _plain(tokenizer))
    write_atomic(directory / META, json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
    for path in directory.iterdir():
        fsync(path)
    fsync(directory)
    return notes


def _encoded(
    encoder: ExampleEncoder, batch: list[Record], label_ids: dict[str, int], records: Records, first: int
) -> list[list[Example]]:
    """The examples of records, of which `first` is the number of the first. An error names the place of its record."""
    try:
        return encoder.encode(batch, label_ids)
    except ConfigError as error:
        for number, record in enumerate(batch, start=first):
            try:
                encoder.encode([record], label_ids)
            except ConfigError as alone:
                problem = f"{records.place(number)}: {alone.problem}"
                raise ConfigError(alone.field, alone.value, problem, alone.way_out) from None
        raise error from None  # it is none of the records


class _Seen:
    """The labels, or numbers to predict, of the records in training and of those held out."""

    def __init__(self, config: Config) -> None:
        self.task = config.task
        self.of: tuple[set[Any], set[Any]] = (set(), set())

    def add(self, record: Record, held_out: bool) -> None:
        if len(self.of[held_out]) <= MOST_SEEN:
            self.of[held_out].update(record["tags"] if isinstance(self.task, TaggingConfig) else [record.get("label")])

    def notes(self) -> list[str]:
        if not isinstance(self.task, (ClassificationConfig, TaggingConfig)) or not self.of[False]:
            return []
        train, held_out = self.of
        number = isinstance(self.task, ClassificationConfig) and self.task.regression
        found = []
        if len(train) == 1:
            (only,) = train
            what = "number to predict" if number else "tag" if isinstance(self.task, TaggingConfig) else "label"
            found.append(f"all training examples have the one {what} {only!r}: there is nothing to tell apart")
        if new := sorted(held_out - train) if not number else []:
            found.append(f"no training example has what held-out ones have, and none can be right: {listed(new)}")
        if gaps := sorted(label for label in train | held_out if str(label).lower() in GAPS):
            found.append(f"taken for a label like the others: {listed(gaps)}; if it is a gap, remove those rows")
        return found


def _plain(tokenizer: Any) -> str:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    text: str = tokenizer.to_str(pretty=True)
    return text


def _labels(records: Records, encoder: ExampleEncoder, train_only: bool) -> list[str]:
    """Every label that occurs; whole numbers in their order, anything else by the alphabet.

    `train_only`: where the user says which records are held out, a label that only those have is a mistake.
    """
    found: set[str] = set()
    for record, held_out in records:
        if not (held_out and train_only):
            found.update(encoder.labels_of(record))
    if all(re.fullmatch(r"-?[0-9]+", label) for label in found):
        return sorted(found, key=lambda label: (int(label), label))
    return sorted(found)


def _texts(record: Record) -> Iterator[str]:
    for name in ("text", "text_pair", "question", "context", "source", "target", "prompt", "response"):
        if name in record:
            yield record[name]
    if "words" in record:
        yield " ".join(record["words"])
    for message in record.get("messages", ()):
        yield message["content"]


def _together(records: Iterable[tuple[Record, bool]]) -> Iterator[list[tuple[Record, bool]]]:
    rest = iter(records)
    while batch := list(islice(rest, ENCODED_TOGETHER)):
        yield batch


def _blame(config: Config) -> tuple[str, object]:
    path = getattr(config.data, "path", None)
    return ("data.path", path) if path else ("data.kind", config.data.kind)
