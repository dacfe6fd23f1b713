"""What a killed rank leaves in /dev/shm goes; what others have there stays."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bigtrain.launch import shared_memory
from bigtrain.launch.shared_memory import FOLDER, Segments

MAP = """
import mmap, sys, time
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 4096)
print(flush=True)
time.sleep(100)
"""


@pytest.fixture
def name() -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex}"
    yield name
    for path in FOLDER.glob(f"*{name}*"):
        path.unlink()


def mapping(path: Path) -> subprocess.Popen[str]:
    """A process that has the file mapped."""
    process = subprocess.Popen([sys.executable, "-c", MAP, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def make(name: str) -> Path:
    path = FOLDER / name
    path.write_bytes(bytes(4096))
    return path


def test_what_a_rank_had_mapped_is_removed_once_nobody_has_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "FIRST_SAMPLE_SECONDS", 0)
    earlier = make(f"{name}-earlier")
    segments = Segments(port=1234)
    mine, shared, others = make(f"{name}-mine"), make(f"{name}-shared"), make(f"{name}-others")
    ranks = [mapping(path) for path in (mine, shared, earlier)]
    outsider = mapping(shared)
    try:
        segments.sample([psutil.Process(rank.pid) for rank in ranks])
        assert segments.remove() == []  # all in use
        for rank in ranks:
            rank.kill()
            rank.wait()
        assert segments.remove() == [mine.name]
        assert earlier.exists()
        assert shared.exists()
        assert others.exists()
    finally:
        for process in (*ranks, outsider):
            process.kill()
            process.wait()


def test_names_that_carry_our_port_or_process(name: str) -> None:
    segments = Segments(port=1234)
    segments.pids.add(77)
    for ours, made in (
        (True, f"deepspeed_allreduce_buffer_0_{name}_1234_0"),
        (False, f"deepspeed_allreduce_buffer_0_{name}_4321_0"),
        (True, f"torch_77_{name}_0"),
        (False, f"torch_777_{name}_0"),
    ):
        path = make(made)
        assert segments.remove() == ([made] if ours else [])
        assert path.exists() != ours
