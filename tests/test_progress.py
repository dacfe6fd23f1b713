"""A command that takes minutes says how far it is: a bar on a terminal, else a line from time to time."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from bigtrain.progress import counted

LOOP = "import time; from bigtrain.progress import counted; [time.sleep(0.2) for _ in counted(range(4), 4, 'counting')]"


def test_lines(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(counted(iter("abc"), 3, "reading", seconds=0)) == ["a", "b", "c"]
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "bigtrain: reading: 0 of 3",
        "bigtrain: reading: 1 of 3, about 0:00:00 left",
        "bigtrain: reading: 2 of 3, about 0:00:00 left",
    ]
    assert list(counted("abc", 3, "reading")) == ["a", "b", "c"]  # what is quick says nothing
    assert capfd.readouterr() == ("", "")


def test_a_bar_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-c", LOOP], stdout=subprocess.PIPE, stderr=theirs, timeout=60, check=True)
    os.close(theirs)
    assert done.stdout == b""
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "counting" in shown
    assert "/4" in shown
