"""A standard stream that is full, closed, left by its reader or short of letters fails no command."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bigtrain import terminal

SETTLED = "import os, sys; from bigtrain import terminal; terminal.settle(goes_on={goes_on}); "


def settled(code: str, goes_on: bool = True, shell: str = "{}", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` after settle() in a process of its own, started by a line of shell that has {} for it."""
    line = shell.format('"$0" -c "$1"')
    return subprocess.run(
        ["bash", "-c", line, sys.executable, SETTLED.format(goes_on=goes_on) + code], capture_output=True, text=True,
        env=os.environ | environment, timeout=60,
    )  # fmt: skip


def test_a_reader_that_leaves_ends_nothing_that_goes_on() -> None:
    reader, writer = os.pipe()
    lost: list[OSError] = []
    stream = terminal.outliving(writer, "utf-8", lost.append)
    print("read", file=stream)
    assert os.read(reader, 99) == b"read\n"
    os.close(reader)
    for _ in range(3):
        print("not read", file=stream)
    stream.flush()
    assert [type(error) for error in lost] == [BrokenPipeError]  # said once
    stream.close()
    os.close(writer)  # which the stream did not


def test_a_full_disk_is_said_once_on_stderr() -> None:
    done = settled("print('a'); print('b'); sys.stderr.write('end\\n')", shell="{} > /dev/full")
    assert done.returncode == 0
    warning = "bigtrain: warning: standard output is lost (No space left on device); going on without it\n"
    assert done.stderr == warning + "end\n"
    assert settled("print('a', file=sys.stderr)", shell="{} 2> /dev/full").returncode == 0


def test_a_closed_stream_is_no_place_for_files(tmp_path: Path) -> None:
    """Else the first file that is opened gets its number, and all that the processes started from here print."""
    code = "file = open('file', 'w'); assert file.fileno() > 2; print('lost'); os.system('echo lost'); sys.stdin.read()"
    done = settled(f"os.chdir({str(tmp_path)!r}); {code}", shell="{} <&- >&- 2>&-")
    assert (done.returncode, (tmp_path / "file").read_text()) == (0, "")


@pytest.mark.parametrize("goes_on", [True, False])
def test_letters_that_the_encoding_lacks_are_written_as_numbers(goes_on: bool) -> None:
    done = settled("print('gr\\u00f6\\u6570')", goes_on, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "gr\\xf6\\u6570\n", "")


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_all() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    stream = terminal.outliving(writer, "utf-8", lambda error: None)
    text = "x" * 300_000 + "\n"  # more than a pipe holds
    thread = threading.Thread(target=lambda: (stream.write(text), stream.flush(), os.close(writer)))
    thread.start()
    got = b""
    while part := os.read(reader, 65536):
        got += part
    thread.join()
    os.close(reader)
    assert got.decode() == text
