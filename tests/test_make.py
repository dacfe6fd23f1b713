"""`make train` in a fresh clone, set-up included (make soak: it installs everything again)."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_make_train_in_a_fresh_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "TORCH_EXTENSIONS_DIR")}
    started = time.monotonic()
    done = subprocess.run(
        ["make", "train"], cwd=clone, capture_output=True, text=True,
        env=kept | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started < 600
    result = json.loads((clone / "runs/default/result.json").read_text())
    assert result["eval/bits_per_byte"] < result["eval/gzip_bits_per_byte"]
    assert result["eval/bits_per_byte"] < 1.9
    assert result["time/train_seconds"] < 300


def test_a_missing_python_is_one_line(tmp_path: Path) -> None:
    """The Makefile names what is missing, before it makes anything."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "pyproject.toml").touch()
    done = subprocess.run(["make", "train", "PYTHON=no-such-python"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "bigtrain: error: no-such-python is missing or not Python 3.10 to 3.13" in done.stdout
    assert not (tmp_path / ".venv").exists()
