"""Two hosts with a network and processes of their own, real sshd, pdsh and the real deepspeed launcher between them."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

import bigtrain
from bigtrain.config import LaunchConfig
from bigtrain.errors import ConfigError
from bigtrain.launch.hostfile import HostfileBackend
from tests.multinode.conftest import FOREVER
from tests.multinode.hosts import Cluster
from tests.runs import command, losses, result

pytestmark = pytest.mark.timeout(300)
ALL_STOPPED_SECONDS = 30
NASTY = 'it\'s "$HOME" `id`\n\tand a second line \\ [a,b]'


def stopped(cluster: Cluster, process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the command and every process on the hosts to end: all within the promised time."""
    began = time.monotonic()
    out, error = process.communicate(timeout=ALL_STOPPED_SECONDS)
    while left := cluster.leftovers():
        assert time.monotonic() - began < ALL_STOPPED_SECONDS, left
        time.sleep(0.1)
    return process.returncode, out, error


def test_two_hosts_learn_what_one_does(
    cluster: Cluster, base: list[str], tmp_path: Path, alone: dict[int, float]
) -> None:
    code, out, error = stopped_after(cluster.train(*base, "train.steps=6"))
    assert code == 0, out + error
    assert "finished at step 6" in out
    assert cluster.leftovers() == []
    assert result(tmp_path / "run")["world_size"] == 2
    record = json.loads((tmp_path / "run/launch.json").read_text())
    assert record["hosts"] == ["h1", "h2"]
    assert losses(tmp_path / "run") == alone
    assert not list(Path("/dev/shm").glob(f"bigtrain-{os.getuid()}-{record['command'][-1][-32:]}*"))


def stopped_after(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=240)
    return process.returncode, out, error


def test_the_environment_arrives_whole_and_unseen_and_a_killed_rank_ends_all(
    cluster: Cluster, base: list[str], tmp_path: Path
) -> None:
    process = cluster.train(
        *base, *FOREVER, "launch.restarts=0", "launch.forward=[MY_OWN]", MY_OWN=NASTY,
        WANDB_API_KEY="key-that-is-secret",
        HF_HOME="/a b/c", no_proxy="a,b", UNRELATED="x",
    )  # fmt: skip
    cluster.wait_for_steps(process, tmp_path / "run", 2)
    ranks = [rank for host in cluster.hosts for rank in host.ranks()]
    assert len(ranks) == 2
    for rank in ranks:
        environment = rank.environ()
        assert environment["MY_OWN"] == NASTY
        assert environment["WANDB_API_KEY"] == "key-that-is-secret"
        assert (environment["HF_HOME"], environment["no_proxy"]) == ("/a b/c", "a,b")
        assert "UNRELATED" not in environment
    for any_process in psutil.process_iter():
        try:
            assert "key-that-is-secret" not in " ".join(any_process.cmdline())
        except psutil.Error:
            continue
    (victim,) = cluster.hosts[1].ranks()
    victim.kill()
    code, out, error = stopped(cluster, process)
    assert code == 1
    assert re.match(r"bigtrain: error: rank 1 on h2 was killed( by SIGKILL)? after step \d+", error), error
    assert error.count("\n") == 1
    assert "key-that-is-secret" not in out + error + (tmp_path / "run/logs/launcher.log").read_text()


def test_a_cut_link_stops_everything_on_both_sides(cluster: Cluster, base: list[str], tmp_path: Path) -> None:
    process = cluster.train(*base, *FOREVER, "launch.restarts=0")
    cluster.wait_for_steps(process, tmp_path / "run", 2)
    try:
        cluster.hosts[1].cut()
        code, _, error = stopped(cluster, process)
    finally:
        cluster.hosts[1].heal()
    assert code == 1
    assert re.match(r"bigtrain: error: host h2 was lost \(no word from it for \d+ s\) after step \d+", error), error


def test_what_is_wrong_before_the_start_is_one_line(cluster: Cluster, base: list[str], tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("h1 slots=1\nnobody slots=1\n")
    code, _, error = stopped_after(cluster.train(*base, f"launch.hostfile={hostfile}"))
    assert code == 1
    assert "1 of 2 hosts cannot be used: nobody: ssh: Could not resolve hostname" in error
    assert not (tmp_path / "run").exists()

    code, _, error = stopped_after(cluster.train(*base, f"run_dir={cluster.hosts[1].private}/run"))
    assert (code, error.count("\n")) == (2, 1)
    assert "host h2 does not see the same directory" in error

    hold = "import socket, time; s = socket.create_server(('', 29711)); time.sleep(60)"
    taken = ["ip", "netns", "exec", cluster.hosts[0].space, "python3", "-c", hold]
    holder = subprocess.Popen(taken)
    try:
        code, _, error = stopped_after(cluster.train(*base, "launch.master_port=29711"))
    finally:
        holder.kill()
        holder.wait()
    assert code == 1
    assert "launch.master_port=29711: cannot be used on h1 (Address already in use)" in error
    assert cluster.leftovers() == []


def doctor(cluster: Cluster, file: Path) -> subprocess.CompletedProcess[str]:
    words = command("doctor", "--launch", "hostfile", "--hostfile", str(cluster.hostfile), "--ssh-config",
                    f"{cluster.folder}/ssh_config", "--cluster-file", str(file))  # fmt: skip
    return subprocess.run(cluster.inside(*words), capture_output=True, text=True, timeout=200)


def test_the_doctor_looks_at_every_host_and_the_network_between(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("device: {name: CPU}\nnodes: 1\ninter_node_gb_per_second: 1.0\nsource: {disk_gib: measured}\n")
    done = doctor(cluster, file)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^h1 +\d+ +\d+ GiB", done.stdout, re.MULTILINE)
    assert re.search(r"^h2: native ops: cpu_adam (built|can be built), async_io ", done.stdout, re.MULTILINE)
    assert re.search(r"^h1 - h2: [\d.]+ GB/s, \d+ us", done.stdout, re.MULTILINE)
    found = yaml.safe_load(file.read_text())
    assert (found["device"], found["nodes"]) == ({"name": "CPU"}, 2)  # what was there of one node stays
    assert 0 < found["inter_node_gb_per_second"] != 1.0
    assert found["inter_node_latency_us"] > 0
    assert set(found["source"]) == {"disk_gib", "inter_node_gb_per_second", "inter_node_latency_us"}


@pytest.mark.soak
def test_a_slow_link_is_measured_and_changes_no_loss(
    cluster: Cluster, base: list[str], tmp_path: Path, alone: dict[int, float]
) -> None:
    with cluster.hosts[1].slowed(200):
        done = doctor(cluster, tmp_path / "cluster.yaml")
        assert done.returncode == 0, done.stdout + done.stderr
        code, out, error = stopped_after(cluster.train(*base, "train.steps=6"))
    found = yaml.safe_load((tmp_path / "cluster.yaml").read_text())["inter_node_gb_per_second"]
    assert 0.01 < found < 0.03  # 0.025 GB/s is the link's
    assert code == 0, out + error
    assert losses(tmp_path / "run") == alone


@pytest.mark.soak
def test_without_a_shared_filesystem_the_config_arrives_all_the_same(cluster: Cluster, base: list[str]) -> None:
    run = Path(str(cluster.hosts[1].private)) / "run"
    code, out, error = stopped_after(
        cluster.train(*base, f"run_dir={run}", "train.steps=2", "launch.shared_run_dir=false")
    )
    assert code == 0, out + error
    assert result(run)["train/steps"] == 2
    assert not list(run.glob("checkpoints/step-*"))


@pytest.mark.parametrize("victim", ["the command", "the launcher"])
@pytest.mark.soak
def test_a_killed_launching_side_leaves_nobody(cluster: Cluster, base: list[str], tmp_path: Path, victim: str) -> None:
    process = cluster.train(*base, *FOREVER, "launch.restarts=0")
    cluster.wait_for_steps(process, tmp_path / "run", 2)
    if victim == "the command":
        process.kill()
    else:
        for child in psutil.Process(process.pid).children():
            if "deepspeed.launcher.runner" in child.cmdline():
                child.kill()
    code, _, error = stopped(cluster, process)
    assert code != 0
    if victim == "the launcher":
        assert error.count("\n") == 1, error


@pytest.mark.soak
def test_ctrl_c_saves_on_all_hosts(cluster: Cluster, base: list[str], tmp_path: Path) -> None:
    process = cluster.train(*base, *FOREVER)
    cluster.wait_for_steps(process, tmp_path / "run", 2)
    process.send_signal(signal.SIGINT)
    code, out, error = stopped(cluster, process)
    assert (code, error) == (0, "")
    assert re.search(r"stopped at step \d+; to continue: bigtrain train", out)


@pytest.mark.soak
def test_the_nodes_that_are_left_go_on(cluster: Cluster, base: list[str], tmp_path: Path) -> None:
    process = cluster.train(*base, "train.steps=400", "train.save_every=5", "launch.restarts=2", "launch.min_nodes=1")
    cluster.wait_for_steps(process, tmp_path / "run", 12)
    try:
        cluster.hosts[1].kill()
        code, out, error = stopped_after(process)
    finally:
        cluster.hosts[1].boot_again()
        cluster.wait_for_ssh(cluster.hosts[1])
    assert code == 0, out + error
    assert re.search(r"host h2 was lost .*; restart 1 of 2 from the checkpoint of step \d+", out)
    assert "going on with 1 of 2 nodes, without h2" in out
    assert result(tmp_path / "run")["world_size"] == 1
    assert result(tmp_path / "run")["restarts"] == 1


WAYS = ["rank", "frozen rank", "agent", "launcher on the node", "launcher", "node", "unplugged", "link down"]


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """What each kill led to; shown by `pytest -s` at the end."""
    rows: list[str] = []
    yield rows
    print("\n" + "\n".join(rows))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_random_kills_stop_everything_in_time(
    cluster: Cluster, base: list[str], tmp_path: Path, seed: int, table: list[str]
) -> None:
    """Each way of dying two or three times, the host and the moment drawn."""
    chance = random.Random(seed)
    process = cluster.train(*base, *FOREVER, "launch.restarts=0", "launch.hang_seconds=5")
    cluster.wait_for_steps(process, tmp_path / "run", 2 + chance.randrange(50))
    host, way = chance.choice(cluster.hosts), WAYS[seed % len(WAYS)]
    began = time.monotonic()
    try:
        if way == "node":
            host.kill()
        elif way == "unplugged":
            host.cut()
        elif way == "link down":
            host.link_down()
        elif way == "agent":
            for agent in host.running("bigtrain.launch.agent"):
                agent.kill()
        elif way == "launcher on the node":
            for launcher in host.running("deepspeed.launcher.launch"):
                launcher.kill()
        elif way == "launcher":
            for child in psutil.Process(process.pid).children():
                if "deepspeed.launcher.runner" in child.cmdline():
                    child.kill()
        else:
            (rank,) = host.ranks()
            rank.send_signal(signal.SIGSTOP if way == "frozen rank" else signal.SIGKILL)
        code, _, error = stopped(cluster, process)
    finally:
        if way == "node":
            host.boot_again()
            cluster.wait_for_ssh(host)
        elif way == "unplugged":
            host.heal()
        elif way == "link down":
            host.link_up()
    seconds = time.monotonic() - began
    table.append(f"{seed:2} {way:20} {host.name} {seconds:5.1f} s, 0 processes left: {error.strip()}")
    assert code == 1, error
    assert error.startswith("bigtrain: error: "), error
    assert error.count("\n") == 1, error
    assert seconds < ALL_STOPPED_SECONDS
    if way in ("agent", "node", "unplugged", "link down"):
        assert f"host {host.name} was lost" in error  # not a rank that waits for it, nor one there


def mpirun_of(implementation: str, folder: Path) -> str | None:
    """A folder whose mpirun is that implementation's, where Debian has put several; None if it is not installed."""
    program = shutil.which(f"mpirun.{implementation}")
    if program is None:
        return None
    folder.mkdir()
    (folder / "mpirun").write_text(f'#!/bin/sh\nexec {program} "$@"\n')  # no link: MPICH looks beside it for more
    (folder / "mpirun").chmod(0o755)
    return str(folder)


@pytest.mark.soak
@pytest.mark.parametrize("runner", ["openmpi", "mpich"])
def test_other_launchers_of_deepspeed_learn_the_same_and_end_the_same(
    cluster: Cluster, base: list[str], tmp_path: Path, alone: dict[int, float], runner: str
) -> None:
    folder = mpirun_of(runner, tmp_path / "bin")
    if folder is None:
        pytest.skip(f"mpirun.{runner} is missing: apt-get install openmpi-bin mpich")
    path = {"PATH": f"{folder}:{os.environ['PATH']}", "HYDRA_IFACE": "br0"}  # MPICH: the hub's name leads elsewhere
    chosen = [*base, f"launch.runner={runner}"]
    code, out, error = stopped_after(cluster.train(*chosen, "train.steps=6", **path))
    assert code == 0, out + error
    assert losses(tmp_path / "run") == alone
    assert cluster.leftovers() == []

    process = cluster.train(*chosen, f"run_dir={tmp_path}/killed", *FOREVER, "launch.restarts=0", **path)
    cluster.wait_for_steps(process, tmp_path / "killed", 2)
    (victim,) = cluster.hosts[1].ranks()
    victim.kill()
    code, _, error = stopped(cluster, process)
    assert code == 1
    assert re.match(r"bigtrain: error: rank 1 on h2 was killed( by SIGKILL)? after step \d+", error), error
    assert error.count("\n") == 1


def test_another_mpis_starter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, says in (("mpirun", "mpirun (Open MPI) 4.1.4"), ("ssh", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{says}'\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("h1 slots=1\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    backend = HostfileBackend(LaunchConfig(kind="hostfile", hostfile=str(tmp_path / "hosts"), runner="mpich"))
    with pytest.raises(ConfigError, match=r"launch.runner='mpich': mpirun here is another's \(mpirun \(Open MPI\) 4"):
        backend.check()


def test_a_host_with_other_code_or_another_clock_stops_the_run(
    cluster: Cluster, base: list[str], tmp_path: Path
) -> None:
    host, package = cluster.hosts[1], Path(bigtrain.__file__).parent
    shutil.copytree(package, tmp_path / "bigtrain", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "bigtrain/schedule.py", "a") as file:
        file.write("# a change that nobody told the others of\n")
    with host.sees(tmp_path / "bigtrain", of=package):
        code, out, error = stopped_after(cluster.train(*base))
    assert code == 1, out
    assert "the nodes do not have the same software" in error
    assert error.count("\n") == 1
    (head,) = re.findall(r"^ +this machine +h1 +h2$", out, re.MULTILINE)
    (row,) = re.findall(r"^code +(\w{12}) +(\w{12}) +(\w{12})$", out, re.MULTILINE)
    assert row[0] == row[1] != row[2], head

    (library,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    key = (cluster.folder / "user_key.pub").read_text()
    variables = {"LD_PRELOAD": library, "FAKETIME": "+90", "FAKETIME_DONT_FAKE_MONOTONIC": 1}
    options = ",".join(f'environment="{name}={value}"' for name, value in variables.items())
    (tmp_path / "user_key.pub").write_text(f"{options} {key}")
    with host.sees(tmp_path / "user_key.pub", of=cluster.folder / "user_key.pub"):
        code, out, error = stopped_after(cluster.train(*base))
    assert code == 1, out
    assert re.search(r"host h2: its clock is \+(89|9\d) s from the others' \(launch.clock_seconds=\d+\)", error), error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert cluster.leftovers() == []
