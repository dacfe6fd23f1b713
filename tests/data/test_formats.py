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
    "utf-16 text": ("a.txt", "hello".encode("utf-16"), "not UTF-8 at byte 0"),
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
