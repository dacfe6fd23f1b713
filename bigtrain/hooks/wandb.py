"""Weights & Biases: one run, from global rank 0, that a resumed training continues.

Files go to run_dir/wandb. Without a key the run is kept there (offline, `wandb sync` uploads it later) and nobody is
asked anything. wandb is imported only when it is used.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bigtrain.config import WandbConfig, fingerprint, to_dict
from bigtrain.held_out import SAMPLE, WHOLE
from bigtrain.hooks.base import Hook, Metrics, RunInfo
from bigtrain.hooks.jsonl import read_metrics
from bigtrain.provenance import code_sha256
from bigtrain.redact import redact

logger = logging.getLogger(__name__)

LONGEST_NAME = 128  # characters that wandb's server takes of a name
INIT_SECONDS = 30.0  # how long a server may take to answer before the run is kept offline


class WandbHook(Hook):
    """Logs every row at its optimizer step, which is also the x axis.

    A resumed run does some steps a second time. Rows that wandb already has are not sent again, so the history has
    each step once: as the first time showed it.
    """

    name = "wandb"

    def __init__(self) -> None:
        self._run: Any = None
        self._id: str | None = None
        self._first_step = 0  # rows before it are in the history already
        self._info: RunInfo | None = None
        self._stall: _StallWatch | None = None
        self._saved_before: str | None = None  # the checkpoint that the next one goes on from

    def load_state(self, state: dict[str, Any]) -> None:
        self._id = state.get("id")

    def state(self) -> dict[str, Any]:
        return {"id": self._id} if self._id else {}

    def on_start(self, info: RunInfo) -> None:
        import wandb

        options = info.config.logger.wandb
        os.environ.setdefault(
            "WANDB_DATA_DIR", str(info.run_dir / "wandb")
        )  # else artifacts wait in the home directory
        # A checkpoint of another run directory starts a run of its own: two writers would mix in one history.
        earlier = list((info.run_dir / "wandb").glob(f"*run-*-{self._id}")) if self._id else []
        if not (info.resumed and earlier):
            self._id = secrets.token_hex(4)
        settings: dict[str, Any] = {
            "silent": True,  # the console belongs to the progress bar
            "console": "off",
            "disable_git": True,  # a remote's address can hold a login
            "disable_code": True,
            "api_key": find_key(),  # given, so that wandb has nothing to ask
            "init_timeout": INIT_SECONDS,
            "finish_timeout": 60.0,  # a dead network must not hold the ranks at the end
        }
        fields = wandb.Settings.model_fields
        environment = info.config.launch.env
        arguments: dict[str, Any] = {
            **redact(
                {
                    "project": options.project,
                    "entity": options.entity,
                    "name": options.name or info.run_dir.resolve().name[:LONGEST_NAME],
                    "group": options.group,
                    "job_type": options.job_type,
                    "tags": options.tags,
                },
                environment,
            ),
            "id": self._id,
            "resume": "allow",
            "dir": str(info.run_dir),
            "config": redact(_run_config(info), environment),
            "settings": wandb.Settings(**{name: value for name, value in settings.items() if name in fields and value}),
        }
        mode: Any = choose_mode(options, self.warn)
        try:
            self._run = wandb.init(mode=mode, **arguments)
        except Exception as error:  # no network, a wrong key, a server's refusal: keep the run here instead
            if mode == "offline":
                raise
            self.warn(f"wandb cannot be reached, the run is kept offline: {str(error).partition(chr(10))[0]}")
            wandb.teardown()  # or its process holds on to the run's id
            self._run = wandb.init(mode="offline", **arguments)
        # What an online run left here may not have been uploaded: there only the server's word counts.
        kept = [path for path in earlier if self._run.offline or path.name.startswith("offline-")]
        self._first_step = max([self._run.starting_step, *(last_step(path) + 1 for path in kept)])
        axis = "data/tokens" if options.x_axis == "tokens" else "step"
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("data/tokens", step_metric="step")
        self._run.define_metric("*", step_metric=axis)
        for name in (f"{WHOLE}loss", f"{SAMPLE}loss"):
            self._run.define_metric(name, step_metric=axis, summary="min")
        self._begin(info)
        if info.resumed:  # a killed run's last rows may not have reached wandb; metrics.jsonl has them
            for row in read_metrics(info.run_dir / "metrics.jsonl"):
                if row["step"] <= info.start_step:
                    self.on_step(
                        row.pop("step"),
                        {
                            name: value
                            for name, value in row.items()
                            if name != "time" and isinstance(value, (int, float))
                        },
                    )

    def _begin(self, info: RunInfo) -> None:
        """Artifacts that say what runs; alerts about what led here."""
        self._info = info
        options = info.config.logger.wandb
        if info.resumed:
            self._saved_before = f"step-{info.start_step}"
        elif info.config.init_from is not None:
            self._saved_before = info.config.init_from
        if options.artifacts:
            self._log_artifact(lambda: _config_artifact(info, str(self._id)))
            self._log_artifact(_code_artifact)
            if info.resumed and not self._run.offline:
                with suppress(Exception):  # of a session that was offline or without artifacts
                    self._run.use_artifact(f"checkpoint-{self._id}:step-{info.start_step}")
        if options.alerts:
            if info.resumed and (cause := _last_restart(info.run_dir)):
                self._alert("restarted", f"from step {info.start_step}, after: {cause}", "WARN")
            if options.stall_seconds:
                self._stall = _StallWatch(options.stall_seconds, self._alert)

    def _log_artifact(self, make: Callable[[], Any], aliases: list[str] | None = None) -> None:
        """Metrics go on where an artifact cannot be made."""
        try:
            self._run.log_artifact(make(), aliases=aliases)
        except Exception as error:
            self.warn(f"wandb: no artifact: {str(error).partition(chr(10))[0]}")

    def _alert(self, title: str, text: str, level: str) -> None:
        if self._run is not None and self._info is not None and self._info.config.logger.wandb.alerts:
            self._run.alert(title, redact(text), level=level)

    def on_warning(self, step: int, message: str) -> None:
        self._alert(_title(message), f"step {step}: {message}", "WARN")

    def on_checkpoint(self, step: int, path: Path) -> None:
        if self._run is None or self._info is None:
            return
        self._alive()
        if self._info.config.logger.wandb.artifacts:
            before, self._saved_before = self._saved_before, path.name
            artifact = f"checkpoint-{self._id}"
            self._log_artifact(lambda: _checkpoint_artifact(artifact, step, path, before), ["latest", f"step-{step}"])

    def _alive(self) -> None:
        if self._stall is not None:
            self._stall.alive()

    def on_step(self, step: int, metrics: Metrics) -> None:
        self._alive()
        if self._run is not None and step >= self._first_step:
            self._run.log({"step": step, **metrics}, step=step)  # rows of one step are merged

    def on_evaluate(self, step: int, metrics: Metrics) -> None:
        self.on_step(step, metrics)

    def on_rollback(self, step: int, left: int) -> None:
        self._first_step = left + 1  # wandb takes no step twice: there the curve keeps what led to the rollback

    def on_end(self, result: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.summary.update(redact(result))
            self._finish(0)

    def on_failure(self, error: BaseException) -> None:
        self._alert("failed", f"{type(error).__name__}: {error}", "ERROR")
        self._finish(1)

    def close(self) -> None:
        self._finish(1)  # on_end did not come

    def _finish(self, exit_code: int) -> None:
        run, self._run = self._run, None
        if self._stall is not None:
            self._stall.close()
        if run is not None:
            import wandb

            run.finish(exit_code=exit_code)
            wandb.teardown()  # finish may come back before its process has written the file


class _StallWatch:
    """A thread that says, once, that nothing was logged for so long; and again after the next sign of life."""

    def __init__(self, seconds: float, alert: Callable[[str, str, str], None]) -> None:
        self._seconds, self._alert = seconds, alert
        self._last = time.monotonic()
        self._end = threading.Event()
        threading.Thread(target=self._watch, name="stalls", daemon=True).start()

    def alive(self) -> None:
        self._last = time.monotonic()

    def close(self) -> None:
        self._end.set()

    def _watch(self) -> None:
        told = 0.0  # about the silence since then
        while not self._end.wait(min(5.0, self._seconds / 4)):
            last = self._last
            if last != told and time.monotonic() - last >= self._seconds:
                told = last
                self._alert("stalled", f"nothing was logged for {self._seconds:g} seconds", "WARN")


def _title(message: str) -> str:
    """Of an alert: wandb sends no second one of the same title within a minute."""
    for word, title in (("straggler", "straggler"), ("checkpoint", "checkpoint not saved"), (" is nan", "not finite"),
                        (" is inf", "not finite"), (" is -inf", "not finite")):  # fmt: skip
        if word in message:
            return title
    return "loss spike" if "loss" in message else "warning"


def _last_restart(run_dir: Path) -> str | None:
    """Why the run was last started again, if this is that start."""
    if not int(os.environ.get("BIGTRAIN_RESTARTS", "0") or 0):
        return None
    with suppress(OSError, ValueError, KeyError, IndexError):
        line = (run_dir / "restarts.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        return str(json.loads(line)["cause"])
    return None


def _config_artifact(info: RunInfo, run_id: str) -> Any:
    """What the run was started with, as its directory has it: without secrets."""
    import wandb

    artifact = wandb.Artifact(f"config-{run_id}", type="config", metadata={"config_sha256": fingerprint(info.config)})
    for name in ("config.yaml", "launch.json", "ds_config.json", "engine_config.json"):
        if (info.run_dir / name).is_file():
            artifact.add_file(str(info.run_dir / name), name=name)
    return artifact


def _code_artifact() -> Any:
    """bigtrain's own sources. The same name for every run: wandb keeps each version of them once."""
    import wandb

    package = Path(__file__).parents[1]
    artifact = wandb.Artifact("bigtrain-code", type="code", metadata={"code_sha256": code_sha256()})
    for path in sorted(package.rglob("*.py")):
        artifact.add_file(str(path), name=str(path.relative_to(package.parent)))
    return artifact


def _checkpoint_artifact(name: str, step: int, path: Path, before: str | None) -> Any:
    """Where a checkpoint lies, and its manifest, which has the SHA-256 of every file. The files stay where they are."""
    import wandb

    metadata = {"step": step, "path": str(path), "goes_on_from": before}
    artifact = wandb.Artifact(name, type="model", metadata=metadata)
    artifact.add_reference(path.resolve().as_uri(), name=path.name, checksum=False)
    if (path / "manifest.json").is_file():
        artifact.add_file(str(path / "manifest.json"), name="manifest.json")
    return artifact


def _run_config(info: RunInfo) -> dict[str, Any]:
    """What the run is, with the facts that are not in its config."""
    facts = {
        "parameters": info.parameters,
        "world_size": info.world_size,
        "device": info.device_name,
        "tokens_per_step": info.tokens_per_step,
    }
    return {**to_dict(info.config), "run": facts}


def choose_mode(options: WandbConfig, warn: Callable[[str], None] = logger.warning) -> str:
    """online or offline (or what WANDB_MODE says); never online without a key, for wandb would ask for one."""
    mode = os.environ.get("WANDB_MODE", "online") if options.mode == "auto" else options.mode
    if mode == "online" and not (find_key() or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")):
        if options.mode == "online":
            warn("wandb has no key (WANDB_API_KEY or `wandb login`): the run is kept offline")
        return "offline"
    if mode == "disabled":
        warn("wandb keeps nothing of this run: WANDB_MODE=disabled")
    return mode


def find_key() -> str | None:
    """The key that is in the environment or in the netrc file, where `wandb login` puts it."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    import wandb

    host = urlsplit(wandb.setup().settings.base_url).netloc
    hosts = [host] if "WANDB_BASE_URL" in os.environ else [host, "api.wandb.ai"]  # the cloud has had several names
    for place in [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]:
        with suppress(OSError, netrc.NetrcParseError):
            logins = netrc.netrc(os.path.expanduser(place))
            for login in map(logins.authenticators, hosts):
                if login and login[2]:
                    return login[2]
    return None


# ------------------------------------------------------------------------------------ reading its files back


def last_step(directory: Path) -> int:
    """The highest step in a run's file (run-*.wandb) under `directory`, as far as it is readable; -1 if none."""
    steps = [-1]
    for path in directory.glob("run-*.wandb"):
        with suppress(Exception):  # a format of another wandb version, a torn tail: what is known then is enough
            for record in read_records(path):
                if record.WhichOneof("record_type") == "history":
                    steps.append(record.history.step.num)
    return max(steps)


def read_records(path: Path) -> Iterator[Any]:
    """The wandb_internal_pb2.Record messages of a .wandb file, to the first that is torn.

    The file is a LevelDB log (its doc/log_format.md) with 7 bytes of magic and version in front: blocks of 32 KiB,
    in them chunks of checksum (4 bytes), length (2), type (1: whole, 2: first, 3: middle, 4: last part) and data.
    """
    from wandb.proto import wandb_internal_pb2

    block, header = 32 * 1024, struct.Struct("<IHB")
    data, at, parts = path.read_bytes(), header.size, b""
    while at + header.size <= len(data):
        left = block - at % block
        if left < header.size:  # too short for a chunk: zeros up to the next block
            at += left
            continue
        _, length, kind = header.unpack_from(data, at)
        chunk = data[at + header.size : at + header.size + length]
        if kind not in (1, 2, 3, 4) or len(chunk) < length:
            return
        at += header.size + length
        parts = chunk if kind in (1, 2) else parts + chunk
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(parts)
