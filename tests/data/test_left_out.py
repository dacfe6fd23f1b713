"""What of a directory is not read is counted and named, on the terminal and in the record."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bigtrain.config import LabelledDataConfig, TextDataConfig
from bigtrain.data.corpus import open_corpus
from bigtrain.data.left_out import LeftOut, say_and_record
from bigtrain.data.records import open_records


def write_directory(path: Path) -> Path:
    path.mkdir()
    (path / "a.txt").write_text("text\n" * 100)
    (path / "windows.txt").write_bytes("text".encode("utf-16"))
    (path / "no-mark.txt").write_bytes(("text" * 9).encode("utf-16-le"))
    (path / "b.txt.bz2").write_bytes(b"BZh9")
    (path / "c.txt").write_text("")
    (path / ".hidden").write_text("text")
    (path / "link").symlink_to("nowhere")
    (path / "picture.png").write_bytes(b"\x89PNG\0")
    return path


def test_every_file_is_read_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_directory(tmp_path / "corpus")
    corpus = open_corpus(TextDataConfig(path=str(path)), tmp_path)
    read = {file.path.name for file in corpus.files}
    assert read == {"a.txt"}
    assert {Path(name).name for name in corpus.left_out.why} == {name.name for name in path.iterdir()} - read
    (tmp_path / "meta.json").write_text("{}")
    say_and_record(corpus.left_out, tmp_path)
    record = json.loads((tmp_path / "meta.json").read_text())["left_out"]
    assert sum(record["files"].values()) == len(record["names"]) == 7
    said = capsys.readouterr().out
    assert said.startswith("warning: left out of the data: 7 files: ")
    assert "windows.txt (UTF-16" in said
    say_and_record(LeftOut(), tmp_path)
    assert json.loads((tmp_path / "meta.json").read_text())["left_out"] == {}, "of this run, not of the one before"


def test_files_that_hold_no_records_are_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").write_text("read me")
    (tmp_path / "data" / "a.csv").write_text("text,label\na,1\n")
    records = open_records(LabelledDataConfig(path=str(tmp_path / "data")), "classification", tmp_path)
    assert [Path(name).name for name in records.left_out.why] == ["README.md"]


def test_names_beyond_utf_8_are_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / "data" / name).write_text("text " * 9)
    corpus = open_corpus(TextDataConfig(path=str(tmp_path / "data")), tmp_path)
    assert [file.name for file in corpus.files] == [name]
    assert list(corpus.train_sample(10))
