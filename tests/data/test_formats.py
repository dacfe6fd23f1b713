"""Every format that a source may have, as real files, gives the same documents."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from bigtrain.config import TextDataConfig
from bigtrain.data.corpus import open_corpus
from bigtrain.errors import ConfigError
from tests.data.samples import documents

TEXTS = [*documents(6), 'a "quoted",\ncomma\r\n', "é ∑ 🦊 <|endoftext|> in a row\n"]


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS), encoding="utf-8")


def write_json(path: Path) -> None:
    path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1), encoding="utf-8")


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["id", "text"])
        writer.writerows([number, text] for number, text in enumerate(TEXTS))


def write_parquet(path: Path) -> None:
    parquet.write_table(pa.table({"id": list(range(len(TEXTS))), "text": TEXTS}), path, row_group_size=3)


def write_separated(path: Path) -> None:
    path.write_text("\n<|endoftext|>\n".join(TEXTS) + "\n<|endoftext|>\n", encoding="utf-8", newline="")


WRITERS: dict[str, Callable[[Path], None]] = {
    "rows.jsonl": write_jsonl,
    "rows.ndjson": write_jsonl,
    "rows.json": write_json,
    "lines.json": write_jsonl,
    "rows.csv": write_csv,
    "rows.tsv": lambda path: write_csv(path, "\t"),
    "rows.parquet": write_parquet,
    "stories.txt": write_separated,
}


def texts(path: Path, **data: object) -> list[str]:
    """The documents of a source: pieces joined where no new document starts."""
    corpus = open_corpus(TextDataConfig(path=str(path), held_out=0.5, **data), path.parent)  # type: ignore[arg-type]
    found: list[str] = []
    for piece in corpus.pieces():
        assert piece.n_bytes == len(piece.text.encode())
        if piece.starts:
            found.append("")
        found[-1] += piece.text
    assert corpus.position == corpus.size
    return found


@pytest.mark.parametrize(
    ("name", "compression"),
    [(name, end) for name in WRITERS for end in ("", ".gz", ".zst") if not (end and name.endswith(".parquet"))],
)
def test_row_formats_give_their_rows(tmp_path: Path, name: str, compression: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    if compression == ".gz":
        path = tmp_path / (name + ".gz")
        path.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    elif compression == ".zst":
        path = tmp_path / (name + ".zst")
        frames = (tmp_path / name).read_bytes()
        half = len(frames) // 2  # two frames, as parallel compressors write
        path.write_bytes(b"".join(zstandard.compress(part) for part in (frames[:half], frames[half:])))
    assert texts(path) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.log", "noext", "a.txt.gz", "a.txt.zst"])
def test_plain_text_keeps_every_character(tmp_path: Path, name: str) -> None:
    text = "\n".join(TEXTS) + "line\r\nend without newline"
    data = ("\ufeff" + text).encode()
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, lambda data: data)
    (tmp_path / name).write_bytes(pack(data))
    assert "".join(texts(tmp_path / name)) == text


def test_rows_without_text_are_left_out(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": None}, {"text": ""}, {"text": "  \n"}, {"text": "two"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert texts(tmp_path / "a.jsonl") == ["one", "two"]


def test_another_column(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"content": ["x", "y"]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", text_field="content") == ["x", "y"]


def damaged(data: bytes) -> bytes:
    return data[: len(data) // 2]


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "latin-1 text": ("a.txt", "caf\u00e9".encode("latin-1"), "not UTF-8 at byte 3"),
    "latin-1 text beyond a block": ("a.txt", b"x" * (1 << 20) + b"\xe9", "not UTF-8 at byte 1048576"),
    "character cut at the end": ("a.txt", "ab€".encode()[:-1], "not UTF-8 at byte 2"),
    "character cut at a block's end": ("a.txt", b"x" * ((1 << 20) - 1) + b"\xe2\x82y", "not UTF-8 at byte 1048575"),
    "utf-16 text": ("a.txt", "hello".encode("utf-16"), "not UTF-8 but UTF-16"),
    "latin-1 in gzip": (
        "a.txt.gz",
        gzip.compress(b"ab\xe9"),
        "not UTF-8 at byte 2 of the decompressed text",
    ),
    "latin-1 in jsonl": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "not UTF-8 at byte 24"),
    "latin-1 in csv": ("a.csv", b"text\n\xe9\n", "not UTF-8 at byte 5"),
    "latin-1 in a json array": ("a.json", b'["\xe9"]', "not UTF-8 at byte 2"),
    "cut gzip": ("a.txt.gz", damaged(gzip.compress(b"hello" * 1000)), "cannot be read"),
    "no gzip": ("a.txt.gz", b"plain text", "cannot be read"),
    "no zstd": ("a.txt.zst", b"plain text", "cannot be read"),
    "no parquet": ("a.parquet", b"plain text, not parquet", "parquet"),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "deep JSON": ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    "array of text": ("a.json", b'["a", "b"]', "row 1 is str"),
    "number for text": ("a.jsonl", b'{"text": 3}', "row 1 of"),
    "half a surrogate": ("a.jsonl", b'{"text": "\\ud800"}', "surrogate"),
    "missing column jsonl": ("a.jsonl", b'{"body": "a", "id": 1}', "there are: body, id"),
    "missing column csv": ("a.csv", b"body,id\na,1\n", "there are: body, id"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_one_clear_line(tmp_path: Path, case: str) -> None:
    name, data, problem = BAD_FILES[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError) as raised:
        texts(tmp_path / name)
    line = str(raised.value)
    assert problem in line
    assert name in line
    assert "\n" not in line


def test_missing_parquet_column_names_those_there(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"data\.text_field='text'.*a\.parquet.*there are: body, id"):
        texts(tmp_path / "a.parquet")


def test_a_line_without_end_is_refused_before_it_fills_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigtrain.data.formats.ROW_LIMIT", 1 << 16)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * (1 << 17)}))
    with pytest.raises(ConfigError, match="a line at byte 0 is over"):
        texts(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * (1 << 17)}]))
    with pytest.raises(ConfigError, match=r"one JSON array over.*jsonl"):
        texts(tmp_path / "a.json")


def test_an_unknown_compression_is_not_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt.bz2").write_bytes(bz2.compress(b"hello"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        texts(tmp_path / "a.txt.bz2")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("block", [7, 16, 1 << 20])
def test_separators_in_every_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, block: int) -> None:
    monkeypatch.setattr("bigtrain.data.formats.BLOCK_BYTES", block)
    lines = [
        "<|endoftext|>",
        "one",
        "and <|endoftext|> in it",
        " <|endoftext|>\t",
        "<|endoftext|>",
        "",
        "two",
        "<|endoftext|>",
    ]
    (tmp_path / "a.txt").write_bytes(end.join(lines).encode())
    assert texts(tmp_path / "a.txt") == [f"one{end}and <|endoftext|> in it", f"{end}two"]


def test_a_separator_far_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * (1 << 20) + "\n<|endoftext|>\nlast")
    assert [text[-4:] for text in texts(tmp_path / "a.txt")] == ["xxxx", "last"]


@pytest.mark.parametrize("end", [".gz", ".zst"])
def test_a_stream_without_its_end_is_refused(tmp_path: Path, end: str) -> None:
    frame = {".gz": gzip.compress, ".zst": zstandard.compress}[end](b"a story of its own\n" * 500)
    path = tmp_path / f"a.txt{end}"
    for data in (b"", frame[:3], frame[:-1], frame + frame[: len(frame) // 2], frame + b"more"):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"cannot be read|is empty"):
            texts(path)
    if end == ".zst":
        path.write_bytes(b"\x50\x2a\x4d\x18\x04\0\0\0skip" + frame + frame)
        assert len("".join(texts(path))) == 2 * 500 * 19


def test_a_stray_quote_in_a_table_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"he began\n2\tand went on\n3\t"over\nlines"\n4\tend\n')
    assert texts(tmp_path / "a.tsv") == ['"he began', "and went on", "over\nlines", "end"]


TABLES: dict[str, tuple[str, bytes, str]] = {
    "more cells": ("a.csv", b"id,text\n1,a\n2,b,c\n", "line 3 has 3 columns"),
    "fewer cells": ("a.tsv", b"id\ttext\n1\n", "line 2 has 1 column"),
    "an open quote": ("a.csv", b'id,text\n1,"a\n2,b\n', "line 2 is no row of csv"),
    "semicolons": ("a.csv", b"id;text\n1;a\n", "semicolons"),
    "told semicolons": ("a.csv", b"sep=;\nid;text\n1;a\n", "semicolons"),
    "NUL": ("a.csv", b"id,text\n1,a\0\n", "line 2 holds a NUL"),
    "a name twice": ("a.csv", b"text,text\n1,a\n", "two columns are named 'text'"),
    "rows under a key": ("a.json", b'{"data": [{"text": "a"},\n {"text": "b"}]}', "line 1 is not JSON"),
    "rows under a key, indented": ("a.json", b'{\n"data": [{"text": "a"},\n {"text": "b"}]}', "under 'data'"),
    "UTF-16 without a mark": ("a.txt", "hello world".encode("utf-16-le"), "UTF-16LE"),
    "UTF-16": ("a.csv", "text,label".encode("utf-16"), "not UTF-8 but UTF-16"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_is_none_is_refused(tmp_path: Path, case: str) -> None:
    name, data, problem = TABLES[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=problem):
        texts(tmp_path / name)


def test_what_spreadsheets_write(tmp_path: Path) -> None:
    for number, data in enumerate((
        b"\xef\xbb\xbfid,text\r\n1,a\r\n2,b\r\n", b"id,text\r1,a\r2,b\r", b"id,text,,\n1,a,,\n,,,\n2,b,,\n",
        b"sep=,\nid,text\n1,a\n2,b\n",
    )):  # fmt: skip
        (tmp_path / f"{number}.csv").write_bytes(data)
        assert texts(tmp_path / f"{number}.csv") == ["a", "b"]


def test_a_text_field_inside_an_object(tmp_path: Path) -> None:
    rows = [{"data": {"text": "a"}}, {"data": None}, {"data": {"text": "b"}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.jsonl", text_field="data.text") == ["a", "b"]
    assert texts(tmp_path / "a.parquet", text_field="data.text") == ["a", "b"]
    with pytest.raises(ConfigError, match=r"there are: data\.text"):
        texts(tmp_path / "a.jsonl", text_field="data.body")
