"""`bigtrain verify`: the README's tour has it pass on a good stack; here it must fail on a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain import verify
from bigtrain.config import AccelerateConfig, DeepSpeedConfig, from_dict
from tests.runs import TINY, bigtrain

# In every rank: gradients of the engine under test are twice what they should be, which Adam does not mind.
WRONG_GRADIENTS = """
import sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name != "bigtrain.engine.deepspeed":
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec
        spec = find_spec(name)
        run = spec.loader.exec_module
        def run_and_change(module):
            run(module)
            right = module.DeepSpeedEngine.forward_backward
            module.DeepSpeedEngine.forward_backward = lambda self, f, b, scale, last: right(self, f, b, 2 * scale, last)
        spec.loader.exec_module = run_and_change
        return spec
sys.meta_path.insert(0, Finder())
"""


def test_what_is_trained_is_the_config_but_short() -> None:
    config = from_dict({"train": {"steps": 100_000, "precision": "bf16"}, "schedule": {"warmup_steps": 2000},
                        "logger": {"wandb": {"enabled": True}}})  # fmt: skip
    short = verify.shortened(config)
    assert (short.train.steps, short.train.precision, short.train.deterministic) == (verify.STEPS, "bf16", True)
    assert not short.logger.wandb.enabled
    assert isinstance(short.engine, DeepSpeedConfig)
    other = verify.reference(short)
    assert isinstance(other.engine, AccelerateConfig)
    assert other.train.precision == "fp32"
    assert (other.model, other.data, other.optimizer, other.schedule) == (
        short.model, short.data, short.optimizer, short.schedule
    )  # fmt: skip


def test_it_wants_a_directory_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    output = bigtrain("verify", *TINY, f"run_dir={tmp_path}", expect=2)
    assert "run_dir" in output
    assert "name a new one" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


@pytest.mark.soak
def test_wrong_gradients_are_not_trusted(tmp_path: Path, data_cache: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(WRONG_GRADIENTS)
    path = f"{tmp_path / 'site'}:{Path(__file__).parents[1]}"
    output = bigtrain(
        "verify", *TINY, f"run_dir={tmp_path / 'runs'}", f"data.cache_dir={data_cache}",
        f"launch.env={{PYTHONPATH: '{path}'}}", expect=1,
    )  # fmt: skip
    assert "this stack cannot be trusted with this config: " in output
    assert "its gradients' norm;" in output
