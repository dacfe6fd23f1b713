"""`bigtrain doctor` on this machine, and on one that lacks things."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bigtrain import doctor


def command(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bigtrain.cli", "doctor"], env=os.environ | environment, capture_output=True, text=True
    )


def test_this_machine_has_what_its_tests_need() -> None:
    done = command()
    assert (done.returncode, done.stderr) == (0, "")
    for words in (torch.__version__, "deepspeed", "C++ compiler", "cores", "memory", "/dev/shm"):
        assert words in done.stdout
    assert "missing" not in done.stdout


def test_what_is_missing_is_said_with_what_to_install(tmp_path: Path) -> None:
    done = command(PATH=str(tmp_path), CXX="nonesuch")
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if "C++ compiler" in line]
    assert "missing" in line
    assert "apt-get install g++" in line


def test_an_unwritable_cache_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".cache").write_text("a file where a folder should be")
    monkeypatch.setenv("HOME", str(tmp_path))
    (finding,) = [finding for finding in doctor.findings_here() if finding.name == "data cache"]
    assert finding.status == "note"
    assert "data.cache_dir" in finding.way_out


def test_every_finding_that_is_not_good_says_what_to_do() -> None:
    for finding in doctor.findings_here():
        assert finding.status == "good" or finding.way_out, finding
