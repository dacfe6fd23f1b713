"""One node's side of a launch across machines: `python -m bigtrain.launch.agent`, at the far end of an ssh (or srun).

Reads orders from stdin and writes answers to stdout, a line of JSON each. While the ranks run it tells the launching
side what it sees of them, twice a second. It is also the guard: when the launching side ends (stdin closes) or has
been silent for LEASE_SECONDS, as when a link is cut, it kills this node's ranks, frozen ones too, and ends. The ranks
in turn end if it does (BIGTRAIN_PARENT_PID). Needs no port, no shared filesystem, and neither torch nor deepspeed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from bigtrain import hardware, heartbeat
from bigtrain.files import write_atomic
from bigtrain.launch import bandwidth, node_report
from bigtrain.launch.supervise import LAUNCH_ID, find_workers, state_of
from bigtrain.provenance import code_sha256, versions
from bigtrain.redact import redact

LEASE_SECONDS = 10.0  # without a word from the launching side: it is gone, or this node is cut off
REPORT_SECONDS = 0.5
LAST_LINES = 20


class Agent:
    def __init__(self, launch_id: str, say: Callable[[dict[str, Any]], None]) -> None:
        self.launch_id, self.say = launch_id, say
        self.heard = time.monotonic()
        self.listener: socket.socket | None = None
        self.files: Path | None = None  # the folder of the ranks' environments
        self.run_dir: Path | None = None
        self.ranks: list[int] = []  # of this node
        self.workers: dict[int, psutil.Process] = {}
        self.codes: dict[int, tuple[int | None, float]] = {}  # rank -> exit status, when
        self.told: dict[str, Any] = {}  # the last report
        self.reported = 0.0
        self.errands: dict[str, subprocess.Popen[bytes]] = {}  # what takes longer than an answer may, by order
        self.handles: dict[int, int] = {}  # pidfd -> rank: readable when it ends, before its parent reaps it

    # ------------------------------------------------------------------------------------------- orders

    def obey(self, order: dict[str, Any]) -> None:
        self.heard = time.monotonic()
        name = order.pop("do")
        if name == "ping":
            return
        try:
            answer = getattr(self, f"do_{name}")(**order)
        except (OSError, psutil.Error) as error:
            answer = {"error": error.strerror if isinstance(error, OSError) and error.strerror else str(error)}
        self.say({"answer": name} | answer)

    def do_facts(self, run_dir: str, paths: list[str], token: str) -> dict[str, Any]:
        """What this node is and has. `paths`: which of them are there? `token`: is the run directory the same one?"""
        return {
            "host": socket.gethostname(),
            "time": time.time(),
            "code_sha256": code_sha256(),
            "versions": versions(),
            "cores": hardware.cores(),
            "memory_gib": round(hardware.memory_bytes() / 2**30, 1),
            "swap_gib": round(hardware.swap_bytes() / 2**30, 1),
            "gpus": [asdict(gpu) for gpu in hardware.installed_gpus()],
            "torch_is_cpu_build": hardware.torch_is_cpu_build(),
            "addresses": _addresses(),
            "disk_gib": round(_free_bytes(Path(run_dir)) / 2**30, 1),
            "shared_memory_gib": round(_free_bytes(Path("/dev/shm")) / 2**30, 1),
            "compiler": shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++"),
            "missing": [path for path in paths if not Path(path).exists()],
            "sees_run_dir": (Path(run_dir) / token).exists(),
        }

    def do_listen(self, port: int | None) -> dict[str, Any]:
        """Hold a port, to see that it is free and that the others reach it."""
        self.close_listener()
        listener = socket.socket()
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port or 0))
            listener.listen(64)
        except OSError:
            listener.close()
            raise
        self.listener = listener
        return {"port": listener.getsockname()[1]}

    def do_unlisten(self) -> dict[str, Any]:
        self.close_listener()
        return {}

    def do_reach(self, addresses: list[str], port: int, seconds: float) -> dict[str, Any]:
        """Which addresses of the master answer from here, and the interface that leads to each."""
        reached = {}
        for address in addresses:
            with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=seconds) as connection:
                reached[address] = _interface(connection.getsockname()[0])
        return {"reached": reached}

    def do_prepare(
        self, run_dir: str, config: str, sha256: str, private: bool, environments: dict[str, dict[str, str]],
        files: str, shared: bool, directory: str,
    ) -> dict[str, Any]:  # fmt: skip
        """The resolved config and each rank's environment onto this node. Answers with the hash of what lies there."""
        from bigtrain.launch import ops

        if private:
            os.umask(0o077)
        self.run_dir, self.ranks = Path(run_dir), sorted(map(int, environments))
        if not shared:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_atomic(self.run_dir / "config.yaml", config)
            write_atomic(self.run_dir / "config.sha256", f"{sha256}\n")
        for rank in self.ranks:
            (self.run_dir / "failures" / f"rank-{rank}.json").unlink(missing_ok=True)
            (self.run_dir / heartbeat.FOLDER / f"rank-{rank}.json").unlink(missing_ok=True)
        ops.remove_stale_locks(ops.extensions_dir())
        here = {
            "PATH": ops.search_path(), "TORCH_EXTENSIONS_DIR": str(ops.extensions_dir()),
            "BIGTRAIN_PARENT_PID": str(os.getpid()), LAUNCH_ID: self.launch_id,
        }  # fmt: skip
        self.files = Path(files)
        self.files.mkdir(mode=0o700, exist_ok=True)
        for name, environment in environments.items():
            path = self.files / f"rank-{name}.json"
            path.unlink(missing_ok=True)
            start = {
                "arguments": [str(self.run_dir / "config.yaml"), "--sha256", sha256], "directory": directory,
                "environment": here | environment,
            }  # fmt: skip
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                json.dump(start, file)
        found = hashlib.sha256((self.run_dir / "config.yaml").read_bytes()).hexdigest()
        self.workers, self.codes, self.told = {}, {}, {}
        return {"sha256": found}

    def do_signal(self, number: int, ranks: list[int]) -> dict[str, Any]:
        for rank in ranks:
            if rank in self.workers and rank not in self.codes:
                with contextlib.suppress(psutil.Error):
                    self.workers[rank].send_signal(number)
        return {}

    def do_kill(self, grace: float) -> dict[str, Any]:
        """End all of the launch here; what helps the ranks (an uploader) may take so many seconds by itself."""
        return {"left": self.kill(grace)}

    def do_tail(self, rank: int, offset: int | None = None) -> dict[str, Any]:
        """The last lines of a rank's log, or what it has from a byte on."""
        assert self.run_dir is not None
        try:
            with open(self.run_dir / "logs" / f"rank-{rank}.log", "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 8192) if offset is None else offset)
                text = file.read(65536).decode(errors="replace")
        except OSError:
            return {"rank": rank, "text": "", "size": 0}
        if offset is None:
            text = "\n".join(text.splitlines()[-LAST_LINES:])
        return {"rank": rank, "text": redact(text), "size": size}

    def do_read(self, name: str) -> dict[str, Any]:
        """A file of the run directory, for a launching side that does not see it."""
        assert self.run_dir is not None
        try:
            return {"text": (self.run_dir / name).read_text(encoding="utf-8")}
        except OSError:
            return {"text": None}

    def do_bandwidth(self, environment: dict[str, str]) -> dict[str, Any]:
        """This node's part in a measurement with another node."""
        self.errands["bandwidth"] = bandwidth.start(environment, {LAUNCH_ID: self.launch_id})
        return {}

    def do_examine(self, device: str) -> dict[str, Any]:
        """The GPUs' health and the native ops that can be built here, as an errand's answer."""
        self.errands["examine"] = node_report.start(device, {LAUNCH_ID: self.launch_id})
        return {}

    # ------------------------------------------------------------------------------------------ watching

    def look(self) -> None:
        """Report what has changed of this node's ranks."""
        now = time.monotonic()
        for name, errand in list(self.errands.items()):
            if (result := bandwidth.collect(errand)) is not None:
                del self.errands[name]
                self.say({"answer": f"{name}_done"} | result)
        if not self.ranks or now - self.reported < REPORT_SECONDS:
            return
        self.reported = now
        assert self.run_dir is not None
        if len(self.workers) < len(self.ranks):
            for rank, process in find_workers(self._is_ours).items():
                if rank in self.ranks and rank not in self.workers:
                    self.workers[rank] = process
                    with contextlib.suppress(OSError, AttributeError):
                        self.handles[os.pidfd_open(process.pid)] = rank
        state: dict[str, Any] = {}
        for rank in self.ranks:
            state[str(rank)] = {"beat": self._read("heartbeats", rank), "failure": self._read("failures", rank)}
            if rank not in self.workers:
                continue
            process = self.workers[rank]
            self._see_end(rank)
            state[str(rank)] |= {"pid": process.pid}
            if rank in self.codes:
                code, at = self.codes[rank]
                state[str(rank)] |= {"ended": True, "code": code, "ago": now - at}
            else:
                with contextlib.suppress(psutil.Error):
                    state[str(rank)]["status"] = process.status()
        self.say({"state": state})

    def ended(self, handle: int) -> None:
        """The process behind one of `handles` has ended."""
        self._see_end(self.handles.pop(handle))
        os.close(handle)
        self.reported = 0.0

    def _see_end(self, rank: int) -> None:
        if rank not in self.codes:
            alive, code = state_of(self.workers[rank])
            if not alive:
                self.codes[rank] = code, time.monotonic()

    def _read(self, folder: str, rank: int) -> Any:
        assert self.run_dir is not None
        try:
            return json.loads((self.run_dir / folder / f"rank-{rank}.json").read_bytes())
        except (OSError, ValueError):  # not there yet, or caught in the middle of a write
            return None

    def _is_ours(self, process: psutil.Process) -> bool:
        return process.environ().get(LAUNCH_ID) == self.launch_id

    # -------------------------------------------------------------------------------------------- ending

    def kill(self, grace: float = 0) -> int:
        """Kill what belongs to the launch on this node. Returns how many processes could not be ended."""
        begun = time.monotonic()
        while True:
            left = 0
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error, OSError):
                    alive = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
                    if alive and self._is_ours(process):
                        left += 1
                        if time.monotonic() - begun >= grace:
                            process.kill()
            if not left or time.monotonic() - begun > grace + 5:
                return left
            time.sleep(0.05)

    def close(self) -> None:
        self.close_listener()
        self.kill()
        if self.files is not None:
            for rank in self.ranks:
                (self.files / f"rank-{rank}.json").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another node's agent, where nodes share a machine
                self.files.rmdir()

    def close_listener(self) -> None:
        if self.listener is not None:
            self.listener.close()
            self.listener = None


def files_folder(launch_id: str) -> str:
    """Where the ranks' environments lie: in memory where there is /dev/shm."""
    base = "/dev/shm" if os.path.isdir("/dev/shm") else "/tmp"
    return f"{base}/bigtrain-{os.getuid()}-{launch_id}"


def _addresses() -> list[str]:
    """IPv4 addresses of this node by which another may know it; the loopback's last."""
    found = []
    for addresses in psutil.net_if_addrs().values():
        found += [each.address for each in addresses if each.family == socket.AF_INET]
    return sorted(dict.fromkeys(found), key=lambda address: address.startswith("127."))


def _interface(address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return name
    return None


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def main() -> None:
    (launch_id,) = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between the answers

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):  # the launching side decides, not a terminal
        signal.signal(number, signal.SIG_IGN)
    agent = Agent(launch_id, say)
    try:
        say({"answer": "here", "pid": os.getpid()})
        buffer = b""
        while time.monotonic() - agent.heard < LEASE_SECONDS:
            ready, _, _ = select.select([0, *agent.handles], [], [], 0.1)
            for handle in set(ready) - {0}:
                agent.ended(handle)
            if 0 in ready:
                piece = os.read(0, 1 << 16)
                if not piece:
                    return  # the launching side is gone
                *lines, buffer = (buffer + piece).split(b"\n")
                for line in lines:
                    order = json.loads(line)
                    if order["do"] == "end":
                        return
                    agent.obey(order)
            agent.look()
    except BrokenPipeError:
        pass
    finally:
        agent.close()
        os._exit(0)


if __name__ == "__main__":
    main()
