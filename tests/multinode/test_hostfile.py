"""Two hosts with a network and processes of their own, real sshd, pdsh and the real deepspeed launcher between them."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml

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


def test_the_doctor_looks_at_every_host_and_the_network_between(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("device: {name: CPU}\nnodes: 1\ninter_node_gb_per_second: 1.0\nsource: {disk_gib: measured}\n")
    words = command("doctor", "--launch", "hostfile", "--hostfile", str(cluster.hostfile), "--ssh-config",
                    f"{cluster.folder}/ssh_config", "--cluster-file", str(file))  # fmt: skip
    done = subprocess.run(cluster.inside(*words), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^h1 +\d+ +\d+ GiB", done.stdout, re.MULTILINE)
    assert re.search(r"^h1 - h2: [\d.]+ GB/s, \d+ us", done.stdout, re.MULTILINE)
    found = yaml.safe_load(file.read_text())
    assert (found["device"], found["nodes"]) == ({"name": "CPU"}, 2)  # what was there of one node stays
    assert 0 < found["inter_node_gb_per_second"] != 1.0
    assert found["inter_node_latency_us"] > 0
    assert set(found["source"]) == {"disk_gib", "inter_node_gb_per_second", "inter_node_latency_us"}


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


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_random_kills_stop_everything_in_time(cluster: Cluster, base: list[str], tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    process = cluster.train(*base, *FOREVER, "launch.restarts=0", "launch.hang_seconds=5")
    cluster.wait_for_steps(process, tmp_path / "run", 2 + chance.randrange(50))
    host = chance.choice(cluster.hosts)
    way = ["rank", "frozen rank", "agent", "launcher on the node", "node", "link"][seed % 6]
    began = time.monotonic()
    try:
        if way == "node":
            host.kill()
        elif way == "link":
            host.cut()
        elif way == "agent":
            for agent in host.running("bigtrain.launch.agent"):
                agent.kill()
        elif way == "launcher on the node":
            for launcher in host.running("deepspeed.launcher.launch"):
                launcher.kill()
        else:
            (rank,) = host.ranks()
            rank.send_signal(signal.SIGSTOP if way == "frozen rank" else signal.SIGKILL)
        code, _, error = stopped(cluster, process)
    finally:
        if way == "node":
            host.boot_again()
            cluster.wait_for_ssh(host)
        elif way == "link":
            host.heal()
    print(f"{way} on {host.name}: {time.monotonic() - began:.1f} s: {error.strip()}")
    assert code == 1, error
    assert error.startswith("bigtrain: error: "), error
    assert error.count("\n") == 1, error
