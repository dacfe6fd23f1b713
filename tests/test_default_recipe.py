"""What `make train` does after its set-up: the default recipe at half its length, its report, and a first text.

The whole recipe runs in test_make.py (make soak).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import bigtrain, losses, result


@pytest.mark.timeout(900)
def test_the_default_recipe_beats_gzip(tmp_path: Path, data_cache: Path) -> None:
    run = tmp_path / "default"
    bigtrain("train", f"run_dir={run}", f"data.cache_dir={data_cache}", "train.steps=200", timeout=800)
    done = result(run)
    assert done["status"] == "finished"
    assert done["world_size"] >= 1
    assert done["eval/bits_per_byte"] < done["eval/gzip_bits_per_byte"] < 2.5
    assert done["eval/bits_per_byte"] < 2.11, "the recipe has become worse"
    curve = losses(run)
    assert curve[max(curve)] < 0.6 * curve[1]
    page = Path(bigtrain("report", str(run)).strip())
    assert page.is_file()
    assert (page.parent / "loss.png").is_file()
    written = bigtrain("generate", str(run), "--prompt", "def read_file(path):", "--max-new-tokens", "40")
    assert written.startswith("def read_file(path):")
    assert len(written) > 60
