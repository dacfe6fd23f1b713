"""Labelled records: every format gives the same ones, every mistake is one line, the split follows from the text."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from bigtrain.config import LabelledDataConfig
from bigtrain.data import hub
from bigtrain.data.records import Records, open_held_out, open_records
from bigtrain.errors import BigtrainError, ConfigError
from tests.data.samples import documents

LINES = sorted({" ".join(line.split()) for text in documents(6) for line in text.splitlines() if len(line.split()) > 4})
TEXTS = [*LINES[:120], 'a "quoted", comma', '"quoted whole"', "é ∑ 🦊"]
LABELS = [("good", "bad", "so-so")[number % 3] for number in range(len(TEXTS))]


def opened(path: Any, task: str, cache: Path, **data: Any) -> Records:
    given = [str(p) for p in path] if isinstance(path, list) else str(path)
    return open_records(LabelledDataConfig(path=given, **{"held_out": 0.3, **data}), task, cache)


def read(path: Any, task: str, **data: Any) -> list[dict[str, Any]]:
    first = path[0] if isinstance(path, list) else path
    return [record for record, _ in opened(path, task, Path(first).parent, **data)]


# -------------------------------------------------------------------------------------------------- formats


def write_rows(path: Path, columns: dict[str, list[Any]], header: bool = True) -> None:
    """A table in the format that the name asks for."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    kind = path.name.split(".")[1]
    if kind == "parquet":
        parquet.write_table(pa.table(columns), path, row_group_size=50)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
            writer.writerows(([list(columns)] if header else []) + [list(row.values()) for row in rows])


def packed(path: Path, compression: str) -> Path:
    if not compression:
        return path
    pack: Callable[[bytes], bytes] = gzip.compress if compression == ".gz" else zstandard.compress
    target = path.with_name(path.name + compression)
    target.write_bytes(pack(path.read_bytes()))
    return target


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.json", "a.parquet"])
def test_table_formats_give_the_same_records(tmp_path: Path, name: str, compression: str) -> None:
    if name == "a.parquet" and compression:
        compression = ""
    write_rows(tmp_path / name, {"idx": list(range(len(TEXTS))), "label": LABELS, "sentence": TEXTS})
    wanted = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    assert read(packed(tmp_path / name, compression), "classification") == wanted


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
@pytest.mark.parametrize("order", [("text", "label"), ("label", "text")])
def test_a_file_without_header_has_its_label_found(tmp_path: Path, name: str, order: tuple[str, str]) -> None:
    columns = {"text": TEXTS, "label": LABELS}
    write_rows(tmp_path / name, {key: columns[key] for key in order}, header=False)
    records = read(tmp_path / name, "classification")
    assert [record["text"] for record in records] == TEXTS
    assert [record["label"] for record in records] == LABELS


HEADERS: dict[str, tuple[str, bool]] = {
    "known names": ("sentence\tlabel\nfine\t1\n", True),
    "a number's column": ("utterance_1\tgrade\nfine\t1\nbad\t0\n", True),
    "names that never come again": ("said\tmood\n" + "".join(f"line {n}\t{'ab'[n % 2]}\n" for n in range(40)), True),
    "text first": ("a fine film\t1\na bad one\t0\n", False),
    "one word and a label that comes again": ("fine\tpos\n" + "bad\tneg\nnice\tpos\n" * 20, False),
}


@pytest.mark.parametrize("case", HEADERS)
def test_header_is_found_out(tmp_path: Path, case: str) -> None:
    text, header = HEADERS[case]
    (tmp_path / "a.tsv").write_text(text)
    columns = {"text": "0", "label": "1"}
    settings = {"held_out_path": str(tmp_path / "a.tsv")}
    (tmp_path / "b.tsv").write_text(text)
    found = read(tmp_path / "b.tsv", "classification", columns=columns, **settings)
    assert len(found) == 2 * (text.count("\n") - header)
    told = read(tmp_path / "b.tsv", "classification", columns=columns, header=False, **settings)
    assert len(told) == 2 * text.count("\n")


def test_a_quote_in_tsv_does_not_swallow_lines(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('sentence\tlabel\n"he began\t1\nand "went" on\t0\n"it ended"\t1\n"a ""b"""\t0\n')
    texts = [record["text"] for record in read(tmp_path / "a.tsv", "classification", held_out=0.5)]
    assert texts == ['"he began', 'and "went" on', "it ended", 'a "b"']


def test_csv_cells_may_span_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"one\ntwo",1\nthree,0\n"four",\n')
    with pytest.raises(ConfigError, match=r"a\.csv.*line 5: no label; remove the row, or fill it in"):
        read(tmp_path / "a.csv", "classification")


PAIRS = [
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "passage"),
    ("sentence", "question"), ("text", "text_pair"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_pairs_are_known_by_their_names(tmp_path: Path, first: str, second: str) -> None:
    write_rows(tmp_path / "a.jsonl", {second: TEXTS[::-1], first: TEXTS, "label": [n % 2 for n in range(len(TEXTS))]})
    records = read(tmp_path / "a.jsonl", "classification")
    assert records[3] == {"text": TEXTS[3], "text_pair": TEXTS[-4], "label": "1"}


def test_columns_by_name_number_and_path(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.csv", {"premise": TEXTS, "hypothesis": TEXTS[::-1], "n": LABELS})
    records = read(tmp_path / "a.csv", "classification", columns={"text": "hypothesis", "label": 2})
    assert records[0] == {"text": TEXTS[-1], "label": LABELS[0]}, "no second text where columns name the first"
    nested = [{"translation": {"en": text, "de": text.upper()}} for text in TEXTS]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, nested)))
    columns = {"source": "translation.en", "target": "translation.de"}
    assert read(tmp_path / "b.jsonl", "seq2seq", columns=columns)[1] == {"source": TEXTS[1], "target": TEXTS[1].upper()}


def test_a_column_that_is_named_makes_a_header(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.tsv", {"said": TEXTS, "mood": TEXTS[::-1]})
    records = read(tmp_path / "a.tsv", "classification", columns={"text": "said", "label": "mood"})
    assert records[0] == {"text": TEXTS[0], "label": TEXTS[-1]}


def test_regression_has_numbers(tmp_path: Path) -> None:
    scores = [number / 8 for number in range(len(TEXTS))]
    write_rows(tmp_path / "a.tsv", {"score": scores, "sentence1": TEXTS, "sentence2": TEXTS[::-1]})
    assert read(tmp_path / "a.tsv", "regression")[9] == {"text": TEXTS[9], "text_pair": TEXTS[-10], "label": 9 / 8}
    write_rows(tmp_path / "b.tsv", {"number": scores, "words": TEXTS}, header=False)
    assert read(tmp_path / "b.tsv", "regression")[9] == {"text": TEXTS[9], "label": 9 / 8}


SENTENCES = [(line.split(), [("O", "B-X", "I-X")[n % 3] for n in range(len(line.split()))]) for line in LINES[:80]]


def conll_text(separator: str, prefix: str = "", middle: str = "") -> str:
    blocks = ["-DOCSTART-" + separator + "O\n"]
    for words, tags in SENTENCES:
        rows = (f"{prefix}{word}{separator}{middle}{tag}\n" for word, tag in zip(words, tags, strict=True))
        blocks.append("".join(rows))
    return "\n".join(blocks)


@pytest.mark.parametrize("name", ["a.conll", "a.bio", "a.txt", "a.tsv", "a.conll.gz", "a.txt.zst"])
@pytest.mark.parametrize("layout", [("\t", "", ""), (" ", "", "NN I-NP "), ("\t", "en:", ""), ("  ", "", "")])
def test_conll_layouts(tmp_path: Path, name: str, layout: tuple[str, str, str]) -> None:
    plain = tmp_path / ".".join(name.split(".")[:2])
    plain.write_text(conll_text(*layout), encoding="utf-8")
    records = read(packed(plain, Path(name).suffix if name.count(".") > 1 else ""), "tagging")
    assert [(record["words"], record["tags"]) for record in records] == SENTENCES


def test_conll_columns_by_number(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("1 The DT O\n2 end NN B\n\n1 So RB O\n\n1 It PRP O\n\n1 ends VB O\n")
    records = read(tmp_path / "a.conll", "tagging", columns={"words": 1, "tags": "2"})
    assert records[0] == {"words": ["The", "end"], "tags": ["DT", "NN"]}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_tagging_from_tables(tmp_path: Path, name: str) -> None:
    words, tags = [words for words, _ in SENTENCES], [[len(tag) for tag in tags] for _, tags in SENTENCES]
    write_rows(tmp_path / name, {"tokens": words, "ner_tags": tags})
    assert read(tmp_path / name, "tagging")[2] == {"words": words[2], "tags": [str(tag) for tag in tags[2]]}


CONTEXT = "Anna saw Rome. Anna saw Anna."


def squad(n: int = 40) -> dict[str, Any]:
    articles = []
    for number in range(n):
        context = f"{number}: {CONTEXT}"
        start = context.index("Rome")
        questions = [
            {"id": f"{number}a", "question": "What did she see?", "answers": [{"text": "Rome", "answer_start": start}]},
            {"id": f"{number}b", "question": "When?", "answers": [], "is_impossible": True},
        ]
        articles.append({"title": f"t{number}", "paragraphs": [{"context": context, "qas": questions}]})
    return {"version": "v2.0", "data": articles}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_squad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str, indent: int | None) -> None:
    monkeypatch.setattr("bigtrain.data.formats.BLOCK_BYTES", 700)  # articles span blocks
    (tmp_path / "train.json").write_text(json.dumps(squad(), indent=indent))
    path = packed(tmp_path / "train.json", compression)
    records = list(opened(path, "question_answering", tmp_path))
    assert len(records) == 80
    record = records[20][0]
    assert record == {
        "id": "10a", "question": "What did she see?", "context": f"10: {CONTEXT}",
        "answers": [{"text": "Rome", "start": 13}],
    }  # fmt: skip
    assert records[21][0]["answers"] == []
    sides: dict[str, set[bool]] = {}
    for record, held_out in records:
        sides.setdefault(record["context"], set()).add(held_out)
    assert all(len(side) == 1 for side in sides.values()), "a paragraph's questions stay together"


def test_question_answering_from_tables(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "When?", "context": f"{n}: {CONTEXT}", "answers": {"text": [], "answer_start": []}}
        for n in range(9)
    ]
    rows += [{"question": "Who?", "context": CONTEXT, "answers": {"text": ["Anna"], "answer_start": [24]}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = read(tmp_path / "a.jsonl", "question_answering")
    assert records[0]["answers"] == []
    assert records[9] == {
        "id": "a.jsonl:10", "question": "Who?", "context": CONTEXT, "answers": [{"text": "Anna", "start": 24}]
    }  # fmt: skip
    cells = {
        key: [value if isinstance(value := row[key], str) else json.dumps(value) for row in rows] for key in rows[0]
    }
    write_rows(tmp_path / "b.csv", cells)
    assert [record["answers"] for record in read(tmp_path / "b.csv", "question_answering")] == [
        record["answers"] for record in records
    ]


def test_parallel_text(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("\n".join([*TEXTS, "", "last"]), encoding="utf-8")
    (tmp_path / "a.de.gz").write_bytes(gzip.compress("\n".join([*reversed(TEXTS), "", "letzte\n"]).encode()))
    records = read([tmp_path / "a.en", tmp_path / "a.de.gz"], "seq2seq")
    assert records[0] == {"source": TEXTS[0], "target": TEXTS[-1]}
    assert records[-1] == {"source": "last", "target": "letzte"}
    assert len(records) == len(TEXTS) + 1


def test_comments_of_conll_are_left_out_and_the_number_sign_is_a_token(tmp_path: Path) -> None:
    text = "# sent_id = 1\n# text = EU # 1\nEU B-ORG\n# O\n1 O\n\n# sent_id = 2\nhere O\n\n"
    (tmp_path / "a.conll").write_text(text)
    records = opened(tmp_path / "a.conll", "tagging", tmp_path).source()
    assert [record["words"] for record, _ in records] == [["EU", "#", "1"], ["here"]]


def test_instructions(tmp_path: Path) -> None:
    rows = [{"instruction": text, "input": "", "output": "yes"} for text in TEXTS]
    rows[1]["input"] = "this"
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = read(tmp_path / "a.jsonl", "instruction")
    assert records[:2] == [
        {"prompt": TEXTS[0], "response": "yes"},
        {"prompt": f"{TEXTS[1]}\n\nthis", "response": "yes"},
    ]
    chats = [[{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}] for text in TEXTS]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"conversations": chat}) for chat in chats))
    assert read(tmp_path / "b.jsonl", "instruction")[0] == {
        "messages": [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": "yes"}]
    }


def test_a_hub_dataset_has_its_class_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = datasets.ClassLabel(names=["O", "B-X", "I-X"])
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(names)})
    columns = {"tokens": [words for words, _ in SENTENCES], "ner_tags": [names.str2int(tags) for _, tags in SENTENCES]}
    train = datasets.Dataset.from_dict(columns, features=features).to_iterable_dataset()
    monkeypatch.setattr(hub, "_revision", lambda kind, name, key: "abc")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDatasetDict({"train": train}))
    records = opened("org/ner", "tagging", tmp_path)
    assert [(record["words"], record["tags"]) for record, _ in records] == SENTENCES
    assert records.identity()["files"] == [("org/ner:None", "abc")]
    with pytest.raises(ConfigError, match="no split validation; there are: train"):
        list(opened("org/ner", "tagging", tmp_path, held_out_path="org/ner"))


def test_a_hub_model_with_pickled_weights_alone_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SimpleNamespace(rfilename=name) for name in ("config.json", "pytorch_model.bin")]
    info = SimpleNamespace(sha="abc", siblings=files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: info)
    with pytest.raises(ConfigError, match=r"^model\.path='org/old': only pickled weights there \(pytorch_model\.bin\)"):
        hub.model_directory("org/old", "model.path")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **options: str(tmp_path / options["revision"]))
    assert hub.model_directory("org/old", "model.path", weights=False) == tmp_path / "abc"
    files.append(SimpleNamespace(rfilename="model.safetensors"))
    assert hub.model_directory("org/old", "model.path") == tmp_path / "abc"


def test_a_hub_dataset_offline_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", _unreachable)
    with pytest.raises(ConfigError, match=r"data\.path='org/set'.*cannot be reached") as raised:
        opened("org/set", "classification", tmp_path)
    assert "\n" not in str(raised.value)


def _unreachable(*_: object, **__: object) -> None:
    raise OSError("no route to host")


# ---------------------------------------------------------------------------------------------------- split


def test_the_split_follows_the_text_alone(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.tsv", {"text": TEXTS, "label": LABELS})
    write_rows(tmp_path / "b.jsonl", {"more": LABELS, "label": LABELS[::-1], "sentence": TEXTS[::-1]})
    sides = [
        {record["text"]: held_out for record, held_out in opened(tmp_path / name, "classification", tmp_path)}
        for name in ("a.tsv", "b.jsonl")
    ]
    assert sides[0] == sides[1]
    assert 0.15 < sum(sides[0].values()) / len(TEXTS) < 0.45
    more = dict(opened_sides(tmp_path / "a.tsv", tmp_path, 0.6))
    assert all(more[text] for text, held_out in sides[0].items() if held_out), "a larger fraction keeps what was out"


def opened_sides(path: Path, cache: Path, held_out: float) -> list[tuple[str, bool]]:
    return [(record["text"], out) for record, out in opened(path, "classification", cache, held_out=held_out)]


def test_a_held_out_path_is_the_held_out_part(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.tsv", {"text": TEXTS[:50], "label": LABELS[:50]})
    write_rows(tmp_path / "dev.tsv", {"text": TEXTS[50:], "label": LABELS[50:]})
    records = opened(tmp_path, "classification", tmp_path / "c", held_out_path=str(tmp_path / "dev.tsv"))
    assert [(record["text"], out) for record, out in records] == [(text, n >= 50) for n, text in enumerate(TEXTS)]


def test_reading_twice_and_identity(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.tsv", {"text": TEXTS, "label": LABELS})
    records = opened(tmp_path / "a.tsv", "classification", tmp_path)
    assert list(records) == list(records)
    identity = records.identity()
    assert json.loads(json.dumps(identity))["held_out"] == 0.3
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "a.tsv").write_bytes((tmp_path / "a.tsv").read_bytes())
    assert opened(tmp_path / "moved" / "a.tsv", "classification", tmp_path).identity() == identity
    for change in ({"held_out": 0.2}, {"columns": {"text": "text"}}, {"header": True}):
        assert opened(tmp_path / "a.tsv", "classification", tmp_path, **change).identity() != identity
    write_rows(tmp_path / "a.tsv", {"text": TEXTS[1:], "label": LABELS[1:]})
    assert opened(tmp_path / "a.tsv", "classification", tmp_path).identity() != identity


def test_a_directory_may_hold_other_files(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "a.tsv", {"text": TEXTS, "label": LABELS})
    (tmp_path / "set" / "README.md").write_text("about it")
    assert len(read(tmp_path / "set", "classification")) == len(TEXTS)
    assert len(read(tmp_path / "set" / "*.tsv", "classification")) == len(TEXTS)


# ------------------------------------------------------------------------------------------------- mistakes

TSV = "text\tlabel\n" + "".join(f"line {n}\t{n % 2}\n" for n in range(30))


def paragraph(**question: Any) -> str:
    asked = {"id": "q1", "question": "Who?", "answers": [{"text": "Anna", "answer_start": 0}], **question}
    return json.dumps({"data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": [asked]}]}]})


def jsonl(*rows: Any) -> str:
    return "\n".join(map(json.dumps, rows))


# task, file name, content, what the line has to say
MISTAKES: dict[str, tuple[str, str, str, str]] = {
    "missing column": (
        "classification", "a.jsonl", jsonl({"body_": "x", "label": 1}),
        "data.columns: FILE has no column that is known to hold text; there are: body_, label; name it: "
        "data.columns={text: COLUMN}",
    ),
    "three columns without header": (
        "classification", "a.tsv", "a b\tc d\t1\n" * 3, "there are: columns 0 to 2 (the file has no header line)"
    ),
    "two columns that could be either": (
        "classification", "a.tsv", "a b\tc d\nx y\tz w\n", "either of its 2 columns looks like the label"
    ),
    "no column of numbers": (
        "regression", "a.tsv", "a b\tc d\nx y\tz w\n", "neither of its 2 columns looks like the label"
    ),
    "short row": ("classification", "a.tsv", TSV + "alone\n", "line 32 has 1 column where the first has 2"),
    "long row": ("classification", "a.csv", "text,label\na,1\nb, c,0\n", "line 3 has 3 columns where the first has 2"),
    "row over two lines": ("classification", "a.tsv", TSV + '"a\nb"\t1\n', "(a .tsv row is one line)"),
    "quote never closed": ("classification", "a.csv", 'text,label\na,1\n"b,0\nc,1\n', "line 3 is no row of csv"),
    "twice the same column": ("classification", "a.tsv", "text\ttext\tlabel\na\tb\t1\n", "two columns are named"),
    "empty text": ("classification", "a.tsv", TSV + " \t1\n", "line 32: no text"),
    "empty label": ("classification", "a.csv", "text,label\na,1\nb,\n", "line 3: no label"),
    "null label": ("classification", "a.jsonl", jsonl({"text": "a", "label": None}), "line 1: no label"),
    "label that is a list": ("classification", "a.jsonl", jsonl({"text": "a", "label": [1]}), "line 1: label is list"),
    "number for text": ("classification", "a.jsonl", jsonl({"text": 7, "label": 1}), "line 1: text is int"),
    "surrogate": ("classification", "a.jsonl", '{"text": "\\ud800", "label": 1}', "half a surrogate pair"),
    "no number": ("regression", "a.tsv", "text\tscore\nfine\t4\nbad\tlow\n", "line 3: score (label) is 'low'"),
    "nan": ("regression", "a.jsonl", '{"text": "a", "score": NaN}', "line 1: no score (label)"),
    "no JSON": ("classification", "a.jsonl", '{"text": "a", "label": 1}\n{"text"\n', "line 2 is not JSON"),
    "no object": ("classification", "a.jsonl", "[1]\n", "line 1 is list, not an object"),
    "no array": ("classification", "a.json", '[{"text": "a"', "not JSON"),
    "no parquet": ("classification", "a.parquet", "text", "not a readable parquet file"),
    "unknown format": ("classification", "a.txt", "text", "of a format that holds no records of classification"),
    "one text file": ("seq2seq", "a.txt", "text", "two text files, line by line"),
    "nothing": ("classification", "a.tsv", "", "holds no record"),
    "only a header": ("classification", "a.csv", "text,label\n", "holds no record"),
    "only a DOCSTART": ("tagging", "a.conll", "-DOCSTART- O\n\n", "holds no record"),
    "one record": ("classification", "a.jsonl", jsonl({"text": "a", "label": 1}), "of 1 records is empty"),
    "no tag": ("tagging", "a.conll", "The O\nend\n\n", "line 2: no tag after the token 'end'"),
    "no tag at all": ("tagging", "a.txt", "The\nend\n", "line 1: no tag after the token 'The'"),
    "cut off": ("tagging", "a.conll", "The\tO\nend", "the file ends in this line, it may be cut off"),
    "empty tag": ("tagging", "a.conll", "The\tO\nend\t\n", "line 2: no tag after the token in 'end\\t'"),
    "empty token": ("tagging", "a.conll", "The\tO\n\tO\n", "line 2: no token before the tag in '\\tO'"),
    "empty token behind a prefix": ("tagging", "a.conll", "en:The\tO\nen:\tO\n", "line 2: no token before the tag"),
    "more columns": ("tagging", "a.conll", "The DT O\nold O\n", "line 2: 2 columns where the first has 3: 'old O'"),
    "words and tags": (
        "tagging", "a.jsonl", jsonl({"words": ["a", "b"], "tags": ["O"]}), "line 1: 2 in words, 1 in tags"
    ),
    "empty word": ("tagging", "a.jsonl", jsonl({"words": ["a", ""], "tags": "O O"}), "line 1: words has an empty word"),
    "answer elsewhere": (
        "question_answering", "a.json", paragraph(answers=[{"text": "Rome", "answer_start": 5}]),
        "question q1: the answer 'Rome' is said to start at 5, where 'saw ' stands; it stands at 9",
    ),
    "answer beyond": (
        "question_answering", "a.json", paragraph(answers=[{"text": "Oslo", "answer_start": 99}]),
        "question q1: the answer 'Oslo' is said to start at 99, where nothing stands; the context does not hold it",
    ),
    "answer before": (
        "question_answering", "a.json", paragraph(answers=[{"text": "Anna.", "answer_start": -5}]),
        "where nothing stands",
    ),
    "answer without start": (
        "question_answering", "a.json", paragraph(answers=[{"text": "Anna"}]), "answers has no answer_start"
    ),
    "empty question": ("question_answering", "a.json", paragraph(question=" "), "question q1: no question"),
    "no qas": (
        "question_answering", "a.json", '{"data": [{"title": "t", "paragraphs": [{"context": "c"}]}]}',
        "article 't': qas is not a list of objects",
    ),
    "squad cut off": ("question_answering", "a.json", paragraph()[:-40], "line 1 is not JSON"),
    "squad cut between": ("question_answering", "a.json", paragraph()[:-2], "line 1: the file ends within data"),
    "squad broken": ("question_answering", "a.json", '{"data": [\n{"title": "t",\n!}]}', "line 3 is not JSON"),
    "no answers column": (
        "question_answering", "a.jsonl", jsonl({"question": "q", "context": "c"}), "known to hold answers"
    ),
    "answers in words": (
        "question_answering", "a.csv", "question,context,answers\nq,c,Anna\n", "line 2: answers is no list of answers"
    ),
    "unknown role": (
        "instruction", "a.jsonl", jsonl({"messages": [{"role": "boss", "content": "do"}]}),
        "message 1 has the role 'boss'; one of system, user, assistant, tool",
    ),
    "nothing to learn": (
        "instruction", "a.jsonl", jsonl({"messages": [{"role": "user", "content": "do"}]}), "no answer of the assistant"
    ),
    "no response": ("instruction", "a.jsonl", jsonl({"prompt": "do", "response": ""}), "line 1: no response"),
    "latin-1": ("classification", "a.csv", "text,label\n\udce9,1\n", "not UTF-8 at byte 11"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_clear_line(tmp_path: Path, case: str) -> None:
    task, name, content, problem = MISTAKES[case]
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(ConfigError) as raised:
        read(path, task)
    line = str(raised.value)
    assert problem.replace("FILE", str(path)) in line
    assert "\n" not in line
    assert line.startswith("data.")


COLUMN_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"text": "sentense"}, "data.columns.text='sentense': no such column in FILE; did you mean sentence?"),
    ({"text": 5}, "data.columns.text=5: no such column in FILE; there are: sentence, label"),
    ({"txt": "sentence"}, "data.columns.txt: unknown key; did you mean data.columns.text?"),
]


@pytest.mark.parametrize(("columns", "problem"), COLUMN_MISTAKES)
def test_a_wrong_column_names_those_there(tmp_path: Path, columns: dict[str, Any], problem: str) -> None:
    write_rows(tmp_path / "a.tsv", {"sentence": TEXTS, "label": LABELS})
    with pytest.raises(ConfigError) as raised:
        read(tmp_path / "a.tsv", "classification", columns=columns)
    assert problem.replace("FILE", str(tmp_path / "a.tsv")) in str(raised.value)


def test_conll_columns_go_by_number(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("The O\n")
    for columns, problem in (
        ({"tags": "ner"}, "words and tags go by number"),
        ({"tags": "2"}, r"data\.columns\.tags=2: line 1 of .* has 2 columns; give a number from 0 to 1"),
    ):
        with pytest.raises(ConfigError, match=problem):
            read(tmp_path / "a.conll", "tagging", columns=columns)


def test_parallel_text_of_unequal_length_names_both_counts(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("one\ntwo\nthree\nfour\n")
    (tmp_path / "a.de").write_text("eins\nzwei\n")
    both = [tmp_path / "a.en", tmp_path / "a.de"]
    with pytest.raises(ConfigError, match=r"a\.en': has 4 lines, .*a\.de has 2;"):
        read(both, "seq2seq")
    with pytest.raises(ConfigError, match=r"a\.de': has 2 lines, .*a\.en has 4;"):
        read(both[::-1], "seq2seq")
    (tmp_path / "a.de").write_text("eins\n\ndrei\nvier\n")
    with pytest.raises(ConfigError, match=r"a\.de': line 2 is empty"):
        read(both, "seq2seq")
    with pytest.raises(ConfigError, match="3 text files, they go by pairs"):
        read([*both, write(tmp_path / "b.en")], "seq2seq")


def write(path: Path) -> Path:
    path.write_text("one\n")
    return path


def test_an_empty_held_out_file_and_missing_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.tsv", {"text": TEXTS, "label": LABELS})
    (tmp_path / "dev.tsv").write_text("")
    with pytest.raises(ConfigError, match=r"data\.held_out_path: holds no record"):
        read(tmp_path / "a.tsv", "classification", held_out_path=str(tmp_path / "dev.tsv"))
    with pytest.raises(ConfigError, match="no such file or directory"):
        read(tmp_path / "b.tsv", "classification")
    with pytest.raises(BigtrainError, match="holds no file of labelled records"):
        read(tmp_path / "a.tsv", "classification", held_out_path=str(tmp_path / "a.tsv"))
    with pytest.raises(ConfigError, match=r"data\.held_out=1e-06: the held-out part of \d+ records is empty"):
        read(tmp_path / "a.tsv", "classification", held_out=1e-6)


def labelled(path: Path, *labels: str) -> str:
    path.write_text("text,label\n" + "".join(f"red {n},{label}\n" for n, label in enumerate(labels)))
    return str(path)


def test_one_label_is_one_in_training_and_held_out_files_of_any_format(tmp_path: Path) -> None:
    train = labelled(tmp_path / "a.csv", "1", "0", "true")
    held_out = tmp_path / "b.jsonl"
    held_out.write_text(jsonl(*({"text": f"blue {n}", "label": label} for n, label in enumerate([1.0, 0.0, True]))))
    assert [record["label"] for record in read(train, "classification", held_out_path=str(held_out))] == [
        "1", "0", "True", "1", "0", "True",
    ]  # fmt: skip


def test_a_label_of_held_out_records_alone_is_named_with_its_line(tmp_path: Path) -> None:
    train, held_out = labelled(tmp_path / "a.csv", "spam", "ham"), labelled(tmp_path / "b.csv", "ham", "eggs")
    with pytest.raises(
        ConfigError, match=r"b\.csv': line 3: 'eggs': a label that no training .*; known are spam, ham$"
    ):
        read(train, "classification", held_out_path=held_out)


def test_nan_among_numbers_is_no_label_and_among_words_may_be_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.csv': line 4: the label is nan, which is no label among numbers"):
        read(labelled(tmp_path / "a.csv", "1.0", "2", "nan", "1"), "classification", held_out=0.5)
    languages = read(labelled(tmp_path / "b.csv", *["nan", "deu", "eng"] * 4), "classification", held_out=0.5)
    assert {record["label"] for record in languages} == {"nan", "deu", "eng"}


def test_an_older_runs_labels_keep_their_spelling(tmp_path: Path) -> None:
    data = LabelledDataConfig(path=labelled(tmp_path / "a.csv", "1", "TRUE"))
    found = open_held_out(data, "classification", ["1.0", "true"], tmp_path, "--data")
    assert [record["label"] for record, _ in found] == ["1.0", "true"]
