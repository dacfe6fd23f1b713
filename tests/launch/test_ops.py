"""Where native ops are built, and locks that a killed build leaves."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from bigtrain.config import AccelerateConfig, Config, DeepSpeedConfig, LionConfig
from bigtrain.errors import BigtrainError
from bigtrain.launch import ops


def test_a_dead_builders_lock_is_removed_and_a_live_ones_is_kept(tmp_path: Path) -> None:
    """The locks are torch's own."""
    for name in ("live", "dead"):
        (tmp_path / name).mkdir()
    (tmp_path / "dead" / "lock").touch()
    live = FileBaton(str(tmp_path / "live" / "lock"))
    assert live.try_acquire()
    assert ops.remove_stale_locks(tmp_path) == [tmp_path / "dead" / "lock"]
    assert (tmp_path / "live" / "lock").exists()
    live.release()


def test_each_environment_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/chosen")
    assert ops.extensions_dir() == Path("/chosen")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = set()
    for prefix in (tmp_path / "one", tmp_path / "two", Path("/proc/no/such/environment")):
        if prefix.is_relative_to(tmp_path):
            prefix.mkdir()
        monkeypatch.setattr(sys, "prefix", str(prefix))
        found.add(ops.extensions_dir())
    assert len(found) == 3
    assert sum(path.is_relative_to(tmp_path / "bigtrain") for path in found) == 1  # the one that cannot be written


def test_which_ops_a_run_needs() -> None:
    plain = replace(Config(), engine=DeepSpeedConfig())
    nvme = replace(Config(), engine=DeepSpeedConfig(stage=3, offload_optimizer="nvme", nvme_path="/nvme"))
    assert ops.needed(plain, "cpu") == []
    assert ops.needed(plain, "cuda") == []
    assert ops.needed(nvme, "cuda") == [ops.ASYNC_IO, ops.CPU_ADAM]
    assert ops.needed(nvme, "cpu") == [ops.ASYNC_IO]
    assert ops.needed(replace(plain, optimizer=LionConfig()), "cpu") == [ops.CPU_LION]
    assert ops.needed(replace(plain, optimizer=LionConfig()), "cuda") == [ops.FUSED_LION]
    assert ops.needed(replace(Config(), engine=AccelerateConfig()), "cpu") == []


def test_an_op_counts_as_built_when_its_library_is_there(tmp_path: Path) -> None:
    assert ops.missing([ops.CPU_ADAM], tmp_path) == [ops.CPU_ADAM]
    (tmp_path / ops.CPU_ADAM).mkdir()
    (tmp_path / ops.CPU_ADAM / f"{ops.CPU_ADAM}.so").touch()
    assert ops.missing([ops.CPU_ADAM], tmp_path) == []


def test_an_op_that_cannot_be_built_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed looks for libaio with the C compiler, which finds nothing here."""
    monkeypatch.setenv("CC", "false")
    with pytest.raises(BigtrainError, match=r"async_io cannot be built: libaio-dev .* is missing"):
        ops.build(ops.ASYNC_IO, tmp_path, "cpu")
    assert not (tmp_path / ops.ASYNC_IO / f"{ops.ASYNC_IO}.so").exists()
