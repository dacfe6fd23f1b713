"""What `make train` does after its set-up: the first steps of the default recipe, its report, and a first text.

At half its length it beats gzip (make soak); the whole recipe runs in test_make.py (make soak, too).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import bigtrain, losses, result


@pytest.mark.timeout(2000)  # a minute; on two cores without AVX-512 several
@pytest.mark.parametrize(
    ("steps", "bits_per_byte"), [(40, 2.9), pytest.param(200, 2.11, marks=pytest.mark.soak)]
)  # measured: 2.81, and less than gzip's 2.13
def test_the_default_recipe_learns(steps: int, bits_per_byte: float, tmp_path: Path, data_cache: Path) -> None:
    run = tmp_path / "default"
    bigtrain("train", f"run_dir={run}", f"data.cache_dir={data_cache}", f"train.steps={steps}", timeout=1600)
    done = result(run)
    assert done["status"] == "finished"
    assert done["world_size"] >= 1
    assert done["eval/bits_per_byte"] < bits_per_byte, "the recipe has become worse"
    assert 2 < done["eval/gzip_bits_per_byte"] < 2.5
    curve = losses(run)
    assert curve[max(curve)] < 0.85 * curve[1]
    page = Path(bigtrain("report", str(run)).strip())
    assert page.is_file()
    assert (page.parent / "loss.png").is_file()
    written = bigtrain("generate", str(run), "--prompt", "def read_file(path):", "--max-new-tokens", "40")
    assert written.startswith("def read_file(path):")
    assert len(written) > 60
