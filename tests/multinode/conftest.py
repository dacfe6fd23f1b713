"""Two hosts for a whole module of tests, and the options of a run on them that goes on until something ends it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multinode.hosts import Cluster, missing
from tests.multinode.slurm import NEEDED as SLURM_NEEDS
from tests.multinode.slurm import Slurm
from tests.runs import bigtrain, losses

TINY = [
    "experiment=tiny", "logger.progress=false", "train.eval_every=0", "train.eval_batches=1", "model.dim=16",
    "data.tokenizer.vocab_size=300", "data.held_out=0.01", "launch.device=cpu", "launch.threads_per_rank=1",
]  # fmt: skip
FOREVER = ["train.steps=1000000", "schedule=constant", "schedule.warmup_steps=0"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    private = folder / "private"  # of the second host alone
    private.mkdir()
    cluster = Cluster(folder, 2, private)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if (reason := missing(SLURM_NEEDS)) is not None:
        pytest.skip(reason)
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    yield slurm
    slurm.close()


@pytest.fixture
def base(tmp_path: Path, data_cache: Path) -> list[str]:
    return [*TINY, f"run_dir={tmp_path}/run", f"data.cache_dir={data_cache}"]


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, data_cache: Path) -> dict[int, float]:
    """The losses of six steps on two ranks of this machine: what any two ranks anywhere must find too."""
    run = tmp_path_factory.mktemp("alone") / "run"
    bigtrain("train", *TINY, f"run_dir={run}", f"data.cache_dir={data_cache}", "train.steps=6", "launch.ranks=2")
    return losses(run)
