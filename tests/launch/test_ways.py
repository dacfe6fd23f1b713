"""What the ways to start a run on several nodes check and show, where no node is needed for that."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import bigtrain as bigtrain_package
from bigtrain.config import LaunchConfig
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.launch import cores, environment, hostfile, rank
from bigtrain.launch.survey import check_clocks
from bigtrain.launch.train import train
from bigtrain.launch.ways import resolved, way
from bigtrain.provenance import differences
from tests.runs import TINY, bigtrain, losses
from tests.test_config import composed

pytestmark = pytest.mark.timeout(300)
ADMINS = Path(__file__).parents[2] / "launch"


def read(tmp_path: Path, text: str, **launch: object) -> list[hostfile.Host]:
    path = tmp_path / "hostfile"
    path.write_text(text, encoding="utf-8")
    return hostfile.read(LaunchConfig(kind="hostfile", hostfile=str(path), **launch))  # type: ignore[arg-type]


def test_a_hostfile_is_read_as_the_launcher_reads_it(tmp_path: Path) -> None:
    text = "# nodes\n\nh1 slots=4\n  h2.example.org   slots=4 # the new one\nh3 slots=4\n"
    assert [host.name for host in read(tmp_path, text)] == ["h1", "h2.example.org", "h3"]
    assert [host.name for host in read(tmp_path, text, nodes=2)] == ["h1", "h2.example.org"]
    as_windows_writes_it = "\ufeffh1 slots=4\r\n\r\nh2\tslots=4 \r\n"
    assert [host.name for host in read(tmp_path, as_windows_writes_it)] == ["h1", "h2"]


@pytest.mark.parametrize(
    ("text", "launch", "problem"),
    [
        ("h1 slots=1\nh2 slot=1\n", {}, "line 2 is not `host slots=N`: h2 slot=1"),
        ("h1 slots=1\n-oProxyCommand=x slots=1\n", {}, "line 2 is not"),
        ("h1 slots=1\nh1 slots=2\n", {}, "line 2 names h1 again"),
        ("h1 slots=0\n", {}, "line 1: h1 has no slots"),
        ("me@h1 slots=1\n", {}, "line 1 is not .* me@h1 slots=1; which user ssh takes says launch.ssh_config"),
        ("h1 slots=1 max_slots=2\n", {}, "line 1 is not .*; leave max_slots out"),
        ("h1 slots=1\nfe80::1 slots=1\n", {}, "line 2 is not .*; give the address a name"),
        ("h\0001\0 slots=1\n", {}, "line 1 is not .*; save the file as UTF-8"),
        ("# none\n", {}, "names no host"),
        ("h1 slots=1\n", {"nodes": 2}, "launch.nodes=2: .* lists 1 hosts"),
        ("h1 slots=2\n", {"ranks": 4}, "launch.ranks=4: h1 has 2 slots"),
        ("h1 slots=2\nh2 slots=4\n", {}, "the hosts differ in slots"),
        ("h1 slots=2\n", {"min_nodes": 3}, "launch.min_nodes=3"),
    ],
)
def test_a_hostfile_that_cannot_be_used(tmp_path: Path, text: str, launch: dict[str, int], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read(tmp_path, text, **launch)


def test_a_missing_hostfile_never_means_this_machine_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    error = bigtrain("train", *TINY, "launch=hostfile", f"run_dir={run}", expect=2)
    assert "launch.hostfile=None: launch=hostfile wants one" in error
    error = bigtrain("train", *TINY, "launch=hostfile", "launch.hostfile=/no/such", f"run_dir={run}", expect=2)
    assert "launch.hostfile='/no/such': cannot be read (no such file or directory)" in error
    assert not run.exists()


def test_clocks_that_are_apart_are_named() -> None:
    check_clocks([("h1", 100.0), ("h2", 103.0)], 99.0, 101.0, allowed=5)
    with pytest.raises(BigtrainError, match=r"host h2: its clock is \+200 s"):
        check_clocks([("h1", 100.0), ("h2", 300.0)], 99.5, 100.5, allowed=5)


def test_different_software_is_a_table() -> None:
    same = {"code": "a", "torch": "2.13"}
    assert differences({"h1": same, "h2": dict(same)}) == ""
    table = differences({"h1": same, "h2": {"code": "a", "torch": "2.12"}, "h3": {"code": "a"}})
    assert table.splitlines() == ["       h1    h2    h3", "torch  2.13  2.12  -"]


def test_the_environment_that_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".deepspeed_env").write_text("# comment\n\nNCCL_DEBUG=INFO\nOTHER=a=b\n")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("WANDB_NOTES", "two\nlines $HOME")
    monkeypatch.setenv("MINE", "x")
    config = composed("experiment=tiny", "launch.forward=[MINE]", "launch.env.NCCL_IB_DISABLE='1'")
    found = environment.forwarded(config)
    assert found["NCCL_DEBUG"] == "WARN"  # what is set now, not what the file says
    assert (found["OTHER"], found["MINE"], found["NCCL_IB_DISABLE"]) == ("a=b", "x", "1")
    assert found["WANDB_NOTES"] == "two\nlines $HOME"
    assert "HOME" not in found


@pytest.mark.parametrize(
    "given",
    [
        {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"},
        {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"},
        {"PMI_RANK": "3", "MPI_LOCALRANKID": "1", "PMI_SIZE": "4"},
        {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "OTHER": "x"},
    ],
)
def test_every_launcher_says_who_a_rank_is(given: dict[str, str]) -> None:
    assert rank.identity(given) == {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}


def test_cores_are_shared_out_only_where_the_ranks_fill_them() -> None:
    assert [cores.share([7, 4, 5, 6], number, 2, 2) for number in range(2)] == [[4, 5], [6, 7]]
    assert cores.share([0, 1, 2, 3], 0, 2, 1) == []


@pytest.mark.parametrize("kind", ["manual", pytest.param("torchrun", marks=pytest.mark.soak)])
def test_the_commands_for_each_node_train(tmp_path: Path, data_cache: Path, kind: str) -> None:
    run = tmp_path / "it's mine"
    out = bigtrain(
        "train", *TINY, f"launch={kind}", "launch.nodes=2", "launch.ranks=1", "launch.master_address=127.0.0.1",
        "launch.device=cpu", f'run_dir="{run}"', f"data.cache_dir={data_cache}", "train.steps=2", "train.eval_every=0",
        f"launch.master_port={29800 + (kind == 'manual')}", "launch.env.GLOO_SOCKET_IFNAME=lo",
    )  # fmt: skip
    commands = [line for line in out.splitlines() if line.startswith("env ")]
    assert len(commands) == 2
    nodes = [subprocess.Popen(["sh", "-c", line], stdout=subprocess.DEVNULL) for line in commands]
    assert [node.wait(timeout=200) for node in nodes] == [0, 0]
    assert list(losses(run)) == [1, 2]


@pytest.mark.soak
def test_ranks_with_other_code_stop_with_the_table_though_no_agent_has_looked(tmp_path: Path, data_cache: Path) -> None:
    package = Path(bigtrain_package.__file__).parent
    shutil.copytree(package, tmp_path / "other/bigtrain", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "other/bigtrain/schedule.py", "a") as file:
        file.write("# a change that nobody told the others of\n")
    out = bigtrain(
        "train", *TINY, "launch=torchrun", "launch.nodes=2", "launch.ranks=1", "launch.master_address=127.0.0.1",
        "launch.device=cpu", f"run_dir={tmp_path}/run", f"data.cache_dir={data_cache}", "train.steps=2",
        "launch.master_port=29802", "launch.env.GLOO_SOCKET_IFNAME=lo",
    )  # fmt: skip
    commands = [line for line in out.splitlines() if line.startswith("env ")]
    nodes = [
        subprocess.Popen(
            ["sh", "-c", line], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(path)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for line, path in zip(commands, (package.parent, tmp_path / "other"), strict=True)
    ]  # fmt: skip
    said = [node.communicate(timeout=200)[0] for node in nodes]
    assert all(node.returncode for node in nodes)
    (row,) = re.findall(r"^code +(\w{12}) +(\w{12})$", said[0], re.MULTILINE)
    assert row[0] != row[1]
    assert "bigtrain: error: rank 0: the ranks do not run the same software" in said[0]


def rendered(kind: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the launch/ folder holds: made for this config."""
    monkeypatch.setattr(sys, "executable", "/opt/bigtrain/bin/python")
    words = ["model=llama_7b", "engine=zero3", "run_dir=/work/runs/llama", "data.cache_dir=/work/data",
             "launch.nodes=4", "launch.ranks=8", "launch.device=cuda", "launch.threads_per_rank=8",
             "train.global_batch=256", f"launch={kind}"]  # fmt: skip
    if kind == "kubernetes":
        words += ["launch.kubernetes.volume_claim=work", "launch.kubernetes.variables_from=bigtrain-keys"]
    config = composed(*words)
    found = way(config, print, True)
    config = resolved(config, found.placement)
    if kind == "slurm":
        from bigtrain.launch.slurm import script

        return script(config, found.placement)
    text: str = found.text(config)  # type: ignore[attr-defined]
    return re.sub(r"\b[0-9a-f]{64}\b", "THE-SHA256-OF-THE-CONFIG", text)


@pytest.mark.parametrize(("kind", "name"), [("slurm", "slurm.sbatch"), ("kubernetes", "kubernetes.yaml")])
def test_what_an_admin_copies_is_what_bigtrain_writes(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (ADMINS / name).read_text() == rendered(kind, monkeypatch)


def test_the_example_hostfile_is_one() -> None:
    assert len(hostfile.read(LaunchConfig(kind="hostfile", hostfile=str(ADMINS / "hostfile")))) == 4


def test_kubernetes_takes_the_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    import kubernetes_validate

    objects = list(yaml.safe_load_all(rendered("kubernetes", monkeypatch)))
    assert [each["kind"] for each in objects] == ["Service", "Job"]
    for each in objects:
        kubernetes_validate.validate(each, "1.31", strict=True)
    broken = json.loads(json.dumps(objects[1]))
    broken["spec"]["completionz"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.31", strict=True)
    job = objects[1]["spec"]
    container = job["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert job["template"]["spec"]["subdomain"] == objects[0]["metadata"]["name"]
    assert "--node_rank=$(NODE_RANK)" in container["command"]
    (world,) = [word.partition("=")[2] for word in container["command"] if word.startswith("--world_info")]
    assert len(json.loads(base64.urlsafe_b64decode(world))) == job["completions"] == 4


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("name", "'Not_A_Name'", "not a name"), ("memory", "'lots'", "not a quantity"),
        ("mount_path", "/elsewhere", "not on the volume"),
    ],
)  # fmt: skip
def test_what_kubernetes_would_refuse_is_said_before(key: str, value: str, problem: str) -> None:
    config = composed("experiment=tiny", "launch=kubernetes", "launch.kubernetes.volume_claim=work",
                      "run_dir=/work/run", "data.cache_dir=/work/data", f"launch.kubernetes.{key}={value}")  # fmt: skip
    with pytest.raises(ConfigError, match=problem):
        way(config, print, True)


@pytest.mark.parametrize("kind", ["hostfile", "slurm", "manual", "torchrun", "kubernetes"])
def test_every_way_can_be_shown_without_anything_started(tmp_path: Path, kind: str) -> None:
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    config = composed(
        "experiment=tiny", f"launch={kind}", f"launch.hostfile={tmp_path}/hosts", "launch.nodes=2", "launch.ranks=1",
        "launch.master_address=10.0.0.1", f"run_dir={tmp_path}/run", "launch.dry_run=true",
        "launch.env.MY_API_KEY=secret-of-mine" if kind in ("hostfile", "slurm") else "launch.env.MINE=one",
    )  # fmt: skip
    shown: list[str] = []
    train(config, shown.append, str)
    (text,) = shown
    assert re.search(r"2 nodes x 1 ranks on \w+", text)
    assert "secret-of-mine" not in text
    assert "# effective DeepSpeed config" in text
    assert not (tmp_path / "run").exists()


def test_a_secret_has_no_way_to_ranks_that_others_start(tmp_path: Path) -> None:
    config = composed("experiment=tiny", "launch=manual", "launch.env.MY_API_KEY=secret-of-mine")
    with pytest.raises(BigtrainError, match="the config holds a secret"):
        way(config, print, True)
