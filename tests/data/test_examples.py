"""Labelled records become examples on disk, and examples batches, the same for any number of ranks."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigtrain.config import LABELLED_TASKS, Config, TaggingConfig, from_dict
from bigtrain.data.encode_examples import TaggingEncoder
from bigtrain.data.example_loader import GROUPED, ExampleEvalLoader, ExampleTrainLoader, Rows, Share, pad, stack
from bigtrain.data.examples import Examples, ExampleWriter, PreparedExamples, load_examples
from bigtrain.data.prepare_examples import NOT_ENCODED, prepare_examples
from bigtrain.errors import ConfigError

WORDS = ["red", "green", "blue", "cold", "warm", "dark", "bright", "loud", "quiet"]


def config(folder: Path, task: dict[str, Any], **data: Any) -> Config:
    return from_dict(
        {
            "model": {"kind": "encoder", "dim": 32, "n_heads": 2, "max_seq_len": 24},
            "task": task,
            "data": {"kind": "labelled", "cache_dir": str(folder / "cache"), "tokenizer": {"vocab_size": 300}} | data,
            "logger": {"progress": False},
        }
    )


def tsv(folder: Path, name: str, rows: list[tuple[str, str]]) -> str:
    path = folder / name
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return str(path)


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    draw = np.random.default_rng(seed)
    made = []
    for number in range(count):
        label = str(draw.choice(["good", "bad"]))
        made.append((f"{number} " + " ".join(draw.choice(WORDS, size=int(draw.integers(1, 12)))), label))
    return made


def test_texts_become_tokens_with_labels_by_the_alphabet(tmp_path: Path) -> None:
    rows = sentences(60)
    prepared = prepare_examples(config(tmp_path, {"kind": "classification"}, path=tsv(tmp_path, "a.tsv", rows)))
    assert prepared.labels == ["bad", "good"]
    assert sum(prepared.examples.values()) == 60
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(prepared.tokenizer_file))
    known = dict(rows)
    examples = Examples(prepared, "held_out")
    for index, record in enumerate(prepared.held_out_records()):
        example = examples[index]
        assert prepared.labels[int(example["label"])] == record["label"] == known[record["text"]]
        tokens = example["tokens"].tolist()
        assert tokens[0] == prepared.special_ids["cls"]
        if len(tokens) < 24:
            assert tokens[-1] == prepared.special_ids["sep"]
            assert tokenizer.decode(tokens) == record["text"]


def test_the_same_records_are_encoded_once(tmp_path: Path) -> None:
    path = tsv(tmp_path, "a.tsv", sentences(40))
    first = prepare_examples(config(tmp_path, {"kind": "classification"}, path=path))
    before = (first.directory / "meta.json").stat().st_mtime_ns
    again = prepare_examples(config(tmp_path, {"kind": "classification"}, path=path))
    assert again == first
    assert (first.directory / "meta.json").stat().st_mtime_ns == before
    shorter = prepare_examples(config(tmp_path, {"kind": "classification", "max_length": 8}, path=path))
    assert shorter.directory != first.directory
    assert shorter.cut > 0
    assert Examples(shorter, "train").lengths().max() == 8


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tsv(tmp_path, "a.tsv", sentences(40))
    prepared = prepare_examples(config(tmp_path, {"kind": "classification"}, path=path))
    with open(prepared.directory / "train.tokens.bin", "ab") as file:
        file.write(b"1")
    with pytest.raises(ConfigError, match=r"train\.tokens\.bin"):
        load_examples(prepared.directory)


@pytest.mark.parametrize("at", [3, 1500])  # of one batch of the encoder's, and of another
@pytest.mark.parametrize("first", ["one text", "two texts"])
def test_some_records_with_a_second_text_and_some_without(tmp_path: Path, at: int, first: str) -> None:
    path = tmp_path / "a.jsonl"
    rows = []
    for number in range(2000):
        pair = {"text_pair": "" if (number >= at) == (first == "two texts") else "blue"}
        rows.append(json.dumps({"text": f"red {number}", "label": number % 2} | pair) + "\n")
    path.write_text("".join(rows))
    has, others = ("no", "have one") if first == "two texts" else ("a", "have none")
    said = rf"^data\.path='\S+a\.jsonl': line {at + 1} \('red {at}'\) has {has} text_pair, those before it {others}; .*"
    with pytest.raises(ConfigError, match=said + r"data\.columns={text: COLUMN}$"):
        prepare_examples(config(tmp_path, {"kind": "classification"}, path=str(path)))
    alone = config(tmp_path, {"kind": "classification"}, path=str(path), columns={"text": "text"})
    assert "token_types" not in prepare_examples(alone).ragged


def test_labels_that_are_numbers_are_in_their_order_and_others_by_the_alphabet(tmp_path: Path) -> None:
    def labels(*names: str) -> list[str]:
        path = tsv(tmp_path, "a.tsv", [(f"red {n}", names[n % len(names)]) for n in range(40)])
        return prepare_examples(config(tmp_path, {"kind": "classification"}, path=path)).labels

    assert labels("10", "9", "-1") == ["-1", "9", "10"]
    assert labels("2", "10", "²") == ["10", "2", "²"]  # a digit to str.isdigit, and none to int
    assert labels("--5", "5") == ["--5", "5"]
    assert labels("1", "01", "001", "0001") == ["0001", "001", "01", "1"]  # equal, and still the same each time


def test_a_label_that_only_the_held_out_file_has(tmp_path: Path) -> None:
    held_out = tsv(tmp_path, "b.tsv", [("red", "good"), ("blue", "ugly")])
    with pytest.raises(ConfigError, match=r"'ugly': a label that no training example has; known are bad, good"):
        prepare_examples(
            config(
                tmp_path, {"kind": "classification"}, path=tsv(tmp_path, "a.tsv", sentences(9)), held_out_path=held_out
            )
        )


def test_a_word_without_a_token_is_the_unknown_one() -> None:
    """RoBERTa's number 0 is <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "red": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # of which a space alone has no piece
    encoder = TaggingEncoder(TaggingConfig(), tokenizer, 10)
    ((example,),) = encoder.encode([{"words": ["red", " ", "red"], "tags": ["O", "X", "O"]}], {"O": 0, "X": 1})
    assert example == {"tokens": [2, 3, 2], "targets": [0, 1, 0]}


def test_a_tag_sits_on_the_first_token_of_its_word_and_long_sentences_are_parted(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    lines = []
    for number in range(30):
        length = 3 if number % 3 else 40
        lines.append("\n".join(f"{WORDS[i % 9]}{number} {'B-X' if i % 2 else 'O'}" for i in range(length)) + "\n")
    path.write_text("\n".join(lines))
    prepared = prepare_examples(config(tmp_path, {"kind": "tagging"}, path=str(path), held_out=0.4))
    assert prepared.labels == ["B-X", "O"]
    assert prepared.cut > 0
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(prepared.tokenizer_file))
    found: dict[str, list[str]] = {}
    wanted: dict[str, list[str]] = {}
    examples = Examples(prepared, "held_out")
    records = list(prepared.held_out_records())
    assert len(examples) > len(records)
    for index, number in enumerate(examples.records()):
        record, example = records[number], examples[index]
        key = " ".join(record["words"])
        wanted[key] = record["tags"]
        assert len(example["tokens"]) == len(example["targets"]) <= 24
        starts = np.flatnonzero(example["targets"] != -100)
        first = [tokenizer.decode([token]).strip() for token in example["tokens"][starts]]
        done = len(found.setdefault(key, []))
        for word, piece in zip(record["words"][done:], first, strict=False):
            assert word.startswith(piece)
        found[key] += [prepared.labels[tag] for tag in example["targets"][starts]]
    assert found == wanted


# ------------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    folder = tmp_path_factory.mktemp("examples")
    draw = np.random.default_rng(1)
    with ExampleWriter(folder, "train") as writer:
        for number in range(1200):
            writer.add({"tokens": [number + 1] * int(draw.integers(1, 100)), "label": number % 3})
    prepared = PreparedExamples(
        folder, "", "classification", 2000, {"pad": 0}, [], {"train": 1200}, writer.ragged, writer.single, 0
    )
    return Examples(prepared, "train")


def collate(rows: Rows, random: np.random.Generator | None) -> dict[str, torch.Tensor]:
    return {"tokens": pad(rows, "tokens", 0, 100), "index": stack(rows, "index")}


SHARE = Share(rank=0, world_size=1, global_batch=24, micro_batch=6, seed=3)


def drawn(examples: Examples, world_size: int, step: int) -> list[int]:
    found = []
    for rank in range(world_size):
        share = replace(SHARE, rank=rank, world_size=world_size)
        for batch in ExampleTrainLoader(examples, collate, share).batches(step):
            assert len(batch["index"]) == 6
            assert (batch["tokens"].max(dim=1).values == batch["index"] + 1).all()
            found += batch["index"].tolist()
    return sorted(found)


@pytest.mark.parametrize("step", [0, 7, GROUPED, 3 * GROUPED + 1])
def test_a_steps_examples_do_not_depend_on_the_number_of_ranks(examples: Examples, step: int) -> None:
    assert drawn(examples, 1, step) == drawn(examples, 2, step) == drawn(examples, 4, step)
    assert drawn(examples, 1, step) != drawn(examples, 1, step + 1)


def test_an_epoch_has_each_example_once(examples: Examples) -> None:
    loader = ExampleTrainLoader(examples, collate, SHARE)
    assert 1200 % 24 == 0
    assert GROUPED == 1200 // 24
    epoch = [i for step in range(GROUPED) for batch in loader.batches(step) for i in batch["index"].tolist()]
    assert sorted(epoch) == list(range(1200))
    assert [i for step in range(GROUPED) for part in loader.samples(step) for i in part] == epoch


def test_batches_hold_little_padding_and_come_in_no_order_of_length(examples: Examples) -> None:
    loader = ExampleTrainLoader(examples, collate, SHARE)
    batches = [batch["tokens"] for step in range(GROUPED) for batch in loader.batches(step)]
    padding = sum(int((tokens == 0).sum()) for tokens in batches) / sum(tokens.numel() for tokens in batches)
    assert padding < 0.10  # in batches drawn at random 43%
    lengths = [tokens.size(1) for tokens in batches[::4]]
    assert abs(np.corrcoef(lengths, range(len(lengths)))[0, 1]) < 0.4


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_takes_each_example_once(examples: Examples, world_size: int) -> None:
    found, counts = [], set()
    for rank in range(world_size):
        loader = ExampleEvalLoader(
            examples, collate, Share(rank, world_size, 14 * world_size, 14, 0)
        )  # 1200 is no multiple
        batches = list(loader)
        counts.add(len(batches))
        found += [i for batch in batches for i in batch["index"].tolist()]
    assert len(counts) == 1
    assert sorted(i for i in found if i >= 0) == list(range(1200))
    assert len(found) > 1200


def test_padding_never_outgrows_the_model() -> None:
    rows = [{"tokens": np.arange(n)} for n in (3, 10)]
    assert pad(rows, "tokens", 0, 100).shape == (2, 16)
    assert pad(rows, "tokens", 0, 12).shape == (2, 12)


def test_every_field_of_a_task_is_encoded_or_known_not_to_be() -> None:
    encoded = {"kind", "regression", "max_length", "stride", "template"}
    for task in LABELLED_TASKS:
        for field in fields(task):
            assert (field.name in encoded) != (field.name in NOT_ENCODED), f"decide on {task.__name__}.{field.name}"
