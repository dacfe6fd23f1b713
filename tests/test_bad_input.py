"""What bad input gets: one clear line, a non-zero status, no process left, nothing half-written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml

TEXT = "the quick brown fox jumps over the lazy dog, and then it sleeps. " * 40
OVERRIDES = [
    "experiment=tiny", "data=text", "data.path=corpus", "data.cache_dir=cache", "data.tokenizer.vocab_size=300",
    "model.max_seq_len=16", "data.held_out=0.2", "logger=quiet", "run_dir=run",
]  # fmt: skip


@dataclass
class Row:
    """One piece of bad input: how to set it up in a folder that has a corpus, what to add, what must be said."""

    name: str
    overrides: list[str]
    said: list[str]
    prepare: Callable[[Path], None] = lambda folder: None
    status: int = 2
    prefix: list[str] = field(default_factory=list)  # put before the command


def empty_corpus(folder: Path) -> None:
    shutil.rmtree(folder / "corpus")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").touch()


def short_corpus(folder: Path) -> None:
    shutil.rmtree(folder / "corpus")
    (folder / "corpus").mkdir()
    for name in "abcde":
        (folder / "corpus" / f"{name}.txt").write_text("a b")


def unreadable_corpus(folder: Path) -> None:
    (folder / "corpus" / "0.txt").chmod(0)


def latin1_corpus(folder: Path) -> None:
    (folder / "corpus" / "0.txt").write_bytes("Zürich ".encode("latin-1") * 400)


def a_file(folder: Path) -> None:
    (folder / "run").write_text("I am a file")


def unwritable(folder: Path) -> None:
    (folder / "closed").mkdir(mode=0o555)


def other_run(folder: Path) -> None:
    done = command(folder, "launch=dryrun", "--cfg", "job", "--resolve")
    config = yaml.safe_load(done.stdout)
    config["optimizer"]["lr"] = 0.5
    config["run_dir"] = str(folder / "run")
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run" / ".lock").touch()


def foreign_config(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("services: {web: {}}")
    (folder / "run" / ".lock").touch()


def no_run(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "holiday.jpg").touch()


# Root reads and writes everything; without these two capabilities it obeys permissions as a user does.
AS_USER = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
ON_FULL_DISK = ["unshare", "-m", "sh", "-c", 'mkdir full && mount -t tmpfs -o size=4k tmpfs full && exec "$@"', "sh"]

ROWS = [
    Row("missing path", ["data.path=no/such/file.txt"], ["data.path", "no/such/file.txt"]),
    Row("empty corpus", [], ["data.path", "no text"], empty_corpus),
    Row("corpus shorter than a sequence", [], ["data.path", "shorter than one sequence"], short_corpus),
    Row("unreadable file", [], ["0.txt", "Permission denied"], unreadable_corpus, prefix=AS_USER),
    Row("text that is not UTF-8", [], ["0.txt", "UTF-8"], latin1_corpus),
    Row("vocabulary smaller than the tokenizer's", ["model.vocab_size=280"], ["model.vocab_size=280", "300"]),
    Row("unknown key", ["train.stpes=3"], ["train.stpes: unknown key; did you mean train.steps?"]),
    Row("unknown section", ["optimiser.lr=1"], ["optimiser: unknown key; did you mean optimizer?"]),
    Row("unknown DeepSpeed option", ["engine.deepspeed.gradient_clippping=1.0"],
        ["engine.deepspeed.gradient_clippping", "did you mean"]),
    Row("unknown choice", ["model=gpt2_125m"], ["model='gpt2_125m': no such choice; did you mean gpt2_124m?"]),
    Row("no such group", ["modle=gpt2_124m"], ["modle: unknown key; did you mean model?"]),
    Row("override without =", ["train.steps"], ["train.steps: has no '='"]),
    Row("override that cannot be read", ["data.path=[a,"], ["data.path=[a,: cannot be read"]),
    Row("empty value", ["train.steps="], ["train.steps=''", "whole number"]),
    Row("wrong type", ["train.steps=many"], ["train.steps='many'", "whole number"]),
    Row("interpolation of nothing", ["train.steps=${nope}"], ["train.steps", "nope"]),
    Row("dim not divisible", ["model.dim=65"], ["model.dim=65", "n_heads=2"]),
    Row("ZeRO-2 with parameter offload", ["engine.offload_parameters=cpu"], ["engine.offload_parameters", "stage=3"]),
    Row("batch not divisible", ["train.global_batch=6", "launch.ranks=2"], ["train.global_batch=6", "2 x 4"]),
    Row("zero ranks", ["launch.ranks=0"], ["launch.ranks=0"]),
    Row("negative ranks", ["launch.ranks=-1"], ["launch.ranks=-1"]),
    Row("too many ranks", ["launch.ranks=4096", "launch.device=cpu", "train.global_batch=16384"],
        ["launch.ranks=4096", "too many"]),
    Row("port out of range", ["launch.master_port=80"], ["launch.master_port=80"]),
    Row("run_dir is a file", [], ["run_dir=", "not a directory"], a_file, status=1),
    Row("run_dir below a file", ["run_dir=run/b"], ["run_dir=", "not a directory"], a_file, status=1),
    Row("unwritable run_dir", ["run_dir=closed/run"], ["closed/run", "Permission denied"], unwritable, 1, AS_USER),
    Row("full disk", ["run_dir=full/a/run"], ["run_dir=", "the disk is full"], status=1, prefix=ON_FULL_DISK),
    Row("run_dir holds another run", [], ["holds another run", "optimizer.lr is 0.5 there, 0.002 here"], other_run),
    Row("run_dir holds something else", [], ["run_dir=", "holds no run"], no_run),
    Row("run_dir holds a config of something else", [], ["run_dir=", "services: unknown key"], foreign_config),
    Row("nothing to resume", ["resume=required"], ["resume='required'", "no complete checkpoint"]),
    Row("resume from nowhere", ["resume=elsewhere"], ["resume=", "elsewhere"]),
    Row("weights from nowhere", ["init_from=elsewhere"], ["init_from=", "elsewhere"]),
]  # fmt: skip


def command(folder: Path, *overrides: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, "-m", "bigtrain.cli", "train", *OVERRIDES, *overrides],
        cwd=folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "cache" not in path.parts}


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_bad_input(row: Row, tmp_path: Path) -> None:
    if row.prefix == ON_FULL_DISK and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root with CAP_SYS_ADMIN")
    (tmp_path / "corpus").mkdir()
    for number in range(5):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"{number} {TEXT}")
    row.prepare(tmp_path)
    before = below(tmp_path) | ({"full"} if row.prefix == ON_FULL_DISK else set())
    done = command(tmp_path, *row.overrides, prefix=tuple(row.prefix))
    assert done.returncode == row.status, done.stderr
    assert done.stderr.startswith("bigtrain: error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for words in row.said:
        assert words in done.stderr
    assert below(tmp_path) == before
    assert not [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(tmp_path)]


def test_the_corpus_of_this_test_is_good(tmp_path: Path) -> None:
    """Else every row above might fail for the corpus's sake."""
    (tmp_path / "corpus").mkdir()
    for number in range(5):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"{number} {TEXT}")
    done = subprocess.run(
        [sys.executable, "-m", "bigtrain.cli", "prepare", *OVERRIDES], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.split()[-1]).is_dir()
