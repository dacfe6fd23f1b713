"""Which documents a source has, in which order, and on which side of the split they fall."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigtrain.config import StdlibDataConfig, TextDataConfig
from bigtrain.data import hub
from bigtrain.data.corpus import CUT_PIECES, PIECE_CHARS, Corpus, Piece, cut, open_corpus
from bigtrain.data.formats import SourceFile
from bigtrain.errors import ConfigError
from tests.data.samples import ROOT, documents


def corpus_of(path: object, cache: Path, **data: object) -> Corpus:
    given = [str(p) for p in path] if isinstance(path, list) else str(path)
    return open_corpus(TextDataConfig(path=given, **data), cache)  # type: ignore[arg-type]


def write_tree(root: Path) -> None:
    for name in ("b/2.txt", "a.md", "b/1.py", ".git/config", "b/.hidden.txt", "c/rows.jsonl"):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    (root / "logo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (root / "c" / "loop").symlink_to(root)


def names(corpus: Corpus) -> list[str]:
    return [file.name for file in corpus.files]


def test_directories_are_read_recursively_in_a_fixed_order(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree")
    corpus = corpus_of(tmp_path / "tree", tmp_path)
    assert names(corpus) == ["a.md", "b/1.py", "b/2.txt", "c/rows.jsonl"]
    assert corpus.left_out.record()["files"] == {"binary": 1, "hidden": 2}
    assert "".join(piece.text for piece in corpus.pieces()) == "a.mdb/1.pyb/2.txtc/rows.jsonl"


def test_globs_and_lists(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree")
    assert names(corpus_of(tmp_path / "tree" / "b" / "*.[pt]*", tmp_path)) == ["1.py", "2.txt"]
    assert names(corpus_of(tmp_path / "tree" / "**" / "*.jsonl", tmp_path)) == ["rows.jsonl"]
    both = [tmp_path / "tree" / "b" / "2.txt", tmp_path / "tree" / "b", tmp_path / "tree" / "a.md"]
    assert names(corpus_of(both, tmp_path)) == ["2.txt", "1.py", "a.md"], "each file once, in the order given"


def test_identity_is_content_not_place(tmp_path: Path) -> None:
    for place in ("one", "two/deeper"):
        write_tree(tmp_path / place)
    one, two = (corpus_of(tmp_path / place, tmp_path).identity() for place in ("one", "two/deeper"))
    assert one == two
    (tmp_path / "one" / "a.md").write_text("A.md")  # as long as before
    assert corpus_of(tmp_path / "one", tmp_path).identity() != two


def test_a_remembered_hash_never_hides_a_change(tmp_path: Path) -> None:
    file = tmp_path / "big.txt"
    file.write_text("a" * (1 << 20))
    old = os.stat(file).st_mtime_ns - 10**10
    os.utime(file, ns=(old, old))
    before = corpus_of(file, tmp_path).identity()
    file.write_text("b" * (1 << 20))
    os.utime(file, ns=(old, old))  # size and mtime as before: only ctime tells
    assert corpus_of(file, tmp_path).identity() != before


def test_stdlib_is_split_by_file_at_any_fraction(tmp_path: Path) -> None:
    sizes = {}
    for fraction in (0.05, 0.3, 0.8):
        pieces = list(open_corpus(StdlibDataConfig(held_out=fraction), tmp_path).pieces())
        sizes[fraction] = sum(piece.held_out for piece in pieces if piece.starts) / sum(p.starts for p in pieces)
        assert sizes[fraction] == pytest.approx(fraction, abs=0.05)
        sides: list[bool] = []
        for piece in pieces:
            if piece.starts:
                sides.append(piece.held_out)
            assert piece.held_out == sides[-1], "a file is on one side only"
    held = [
        {p.text for p in open_corpus(StdlibDataConfig(held_out=f), tmp_path).pieces() if p.held_out}
        for f in (0.05, 0.3)
    ]
    assert held[0] < held[1], "what is held out stays so at a larger fraction"


def test_rows_are_split_by_their_text(tmp_path: Path) -> None:
    rows = [f"document {number}" for number in range(2000)]
    random.Random(0).shuffle(rows)

    def split(name: str, rows: list[str]) -> dict[str, bool]:
        (tmp_path / name).write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        pieces = list(corpus_of(tmp_path / name, tmp_path, held_out=0.1).pieces())
        found = {piece.text: piece.held_out for piece in pieces}
        assert all(found[piece.text] == piece.held_out for piece in pieces), "a duplicate straddles the split"
        return found

    small, grown = split("a.jsonl", rows[:1000] * 2), split("b.jsonl", rows)
    assert sum(grown.values()) / len(grown) == pytest.approx(0.1, abs=0.02)
    assert all(grown[row] == side for row, side in small.items()), "a corpus that grows keeps its split"


@pytest.mark.parametrize(("size", "fraction"), [(5_000, 0.3), (100_000, 0.05), (1_100_000, 0.05), (3_000_000, 0.5)])
def test_one_text_file_is_cut_into_both_splits(tmp_path: Path, size: int, fraction: float) -> None:
    text = "\n\n".join("".join(documents())[:size].split("\n\n"))
    text = (text * (size // len(text) + 1))[:size]
    (tmp_path / "book.txt").write_text(text, encoding="utf-8", newline="")
    pieces = list(corpus_of(tmp_path / "book.txt", tmp_path, held_out=fraction).pieces())
    assert "".join(piece.text for piece in pieces) == text
    held_out = [piece for piece in pieces if piece.held_out]
    assert sum(p.n_bytes for p in held_out) / sum(p.n_bytes for p in pieces) == pytest.approx(fraction, rel=0.5)
    assert len(held_out) >= (CUT_PIECES - 1 if size > 50_000 else 1)
    for before, piece in zip([None, *pieces], pieces, strict=False):
        assert piece.starts == (before is None or before.held_out != piece.held_out), "neighbours stay one document"


def test_many_text_files_stay_whole(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number:03}.txt").write_text(f"{number} " * 1000)
    pieces = list(corpus_of(tmp_path / "*.txt", tmp_path, held_out=0.1).pieces())
    assert len(pieces) == 300
    assert all(piece.starts for piece in pieces)
    assert 10 < sum(piece.held_out for piece in pieces) < 60


@pytest.mark.parametrize("fraction", [1e-6, 0.1, 0.5, 1 - 1e-6])
@pytest.mark.parametrize("n", [2, 3, 12])
def test_of_few_documents_one_is_held_out_and_one_is_not(fraction: float, n: int, tmp_path: Path) -> None:
    """By chance none of them would be, or all."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"story {i}"}) + "\n" for i in range(n)))
    corpus = corpus_of(tmp_path / "a.jsonl", tmp_path, held_out=fraction)
    corpus.settle_split()
    sides = [piece.held_out for piece in corpus.pieces()]
    assert len(sides) == n
    assert 0 < sum(sides) < n
    if fraction < 0.1:
        assert sum(sides) == 1
    elif fraction > 0.9:
        assert sum(sides) == n - 1
    corpus.settle_split()
    assert [piece.held_out for piece in corpus.pieces()] == sides


def test_held_out_path(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name * 3000)
    corpus = corpus_of(tmp_path / "*.txt", tmp_path, held_out_path=str(tmp_path / "b.txt"))
    sides = {piece.text[0]: piece.held_out for piece in corpus.pieces()}
    assert sides == {"a": False, "b": True, "c": False}, "a file that is held out is not trained on"


@pytest.mark.parametrize("length", [2, 7, 100, 5000])
def test_cut_is_the_same_whatever_the_blocks(length: int) -> None:
    text = documents(3)[-1][:20_000]
    rng = random.Random(length)

    def blocks() -> Iterator[str]:
        at = 0
        while at < len(text):
            step = rng.randint(1, 3000)
            yield text[at : at + step]
            at += step

    whole = list(cut([text], length))
    assert "".join(whole) == text
    assert max(map(len, whole)) <= length
    assert list(cut(blocks(), length)) == whole
    if length == 5000:
        assert all(piece.endswith("\n") for piece in whole[:-1])


def test_a_long_row_is_one_document_in_pieces(tmp_path: Path) -> None:
    text = "word " * (PIECE_CHARS // 2)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    pieces: list[Piece] = list(corpus_of(tmp_path / "a.jsonl", tmp_path).pieces())
    assert [piece.starts for piece in pieces] == [True, False, False]
    assert "".join(piece.text for piece in pieces) == text


def test_reading_is_memory_flat(tmp_path: Path) -> None:
    """400 MB without a line end or space, in a process that may have 300 MiB of data and grows by less than 64."""
    path = tmp_path / "endless.txt"
    block = ("é" + "x" * 1022) * 1024
    with path.open("w", encoding="utf-8") as file:
        for _ in range(400):
            file.write(block)
    script = (
        "import sys\n"
        "from bigtrain.config import TextDataConfig\n"
        "from bigtrain.data.corpus import open_corpus\n"
        "from pathlib import Path\n"
        "from tests.data.prepare_script import peak_kib\n"
        "before = peak_kib()\n"
        "corpus = open_corpus(TextDataConfig(path=sys.argv[1]), Path(sys.argv[2]))\n"
        "print(sum(piece.n_bytes for piece in corpus.pieces()))\n"
        "print((peak_kib() - before) >> 10)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(path), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (300 << 20, 300 << 20)),
    ).stdout.split()
    assert int(out[0]) == path.stat().st_size
    assert int(out[1]) < 64, "MiB of growth"


def test_train_sample_takes_from_every_file_and_never_from_held_out(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text("\n\n".join(f"{number} {i} text" for i in range(200_000)))
    corpus = corpus_of(tmp_path / "*.txt", tmp_path, held_out=0.3)
    sample = list(corpus.train_sample(8 << 20))
    assert {text.lstrip("\n")[0] for text in sample} == set("01234567")
    assert sum(map(len, sample)) == pytest.approx(8 << 20, rel=0.1)
    held_out = {piece.text for piece in corpus.pieces() if piece.held_out}
    assert held_out.isdisjoint(sample)


def test_hub_dataset_rows_stream_through_datasets(tmp_path: Path) -> None:
    """The datasets library reads a local dataset repository by the same call as one of the hub."""
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "train.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(5)))
    file = SourceFile(repository, "org/name:None", "data.path", 0, hub.STAMP)
    pieces = list(Corpus([file], 0.5).pieces())
    assert [piece.text for piece in pieces] == [f"row {i}" for i in range(5)]
    with pytest.raises(ConfigError, match=r"data\.text_field='body'.*there are: text"):
        list(Corpus([file], 0.5, text_field="body").pieces())
    (repository / "train.jsonl").unlink()
    with pytest.raises(ConfigError, match="the dataset cannot be read"):
        list(Corpus([file], 0.5).pieces())


def test_a_file_that_changes_while_it_is_read_is_found_out(tmp_path: Path) -> None:
    path = tmp_path / "growing.txt"
    path.write_text("text " * 1000)
    corpus = corpus_of(path, tmp_path)
    pieces = corpus.pieces()
    next(pieces)
    with path.open("a") as file:
        file.write("more")
    with pytest.raises(ConfigError, match="changed while it was read"):
        list(pieces)
