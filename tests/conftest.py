"""Settings that every test shares."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

FORBID_SKIPS = os.environ.get("BIGTRAIN_FORBID_SKIPS") == "1"  # set by .ci/run
HAS_GPU = shutil.which("nvidia-smi") is not None

os.environ.setdefault("WANDB_MODE", "offline")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers side by side, and ranks beside them: no more threads than cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts background jobs: children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Where workers share the files out, the longest come first: or one would still be at it when the others are done.
LONGEST = ("test_readme", "test_tasks", "test_train", "test_engines", "test_default_recipe", "test_kills")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU its tests are left out, not skipped: no package can bring one."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if HAS_GPU:
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if FORBID_SKIPS and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped where skips are forbidden: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of prepared data for the whole session, all its workers: the same corpus is tokenized once."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return tmp_path_factory.mktemp("data_cache")
    cache = tmp_path_factory.getbasetemp().parent / "data_cache"
    cache.mkdir(exist_ok=True)
    return cache


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, data_cache: Path) -> Path:
    """A run of two steps on one rank, for tests that copy it and then spoil the copy."""
    from tests.runs import TINY, bigtrain

    run = tmp_path_factory.mktemp("trained") / "run"
    bigtrain("train", *TINY, f"run_dir={run}", f"data.cache_dir={data_cache}", "train.steps=2", "launch.ranks=1",
             "train.eval_every=0", "logger=quiet")  # fmt: skip
    return run
