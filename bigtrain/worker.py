"""One rank of a run, started by the launcher: `python -m bigtrain.worker RUN_DIR/config.yaml --sha256 HEX`.

Reads the resolved config (no Hydra here), builds the parts, trains. What goes wrong is left in
RUN_DIR/failures/rank-N.json for the command that started the run, which prints it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import logging
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from bigtrain import config as configuration
from bigtrain import heartbeat
from bigtrain.config import LABELLED_TASKS, Config
from bigtrain.data.tokenizer import tokenizer_file
from bigtrain.errors import BigtrainError
from bigtrain.files import write_atomic
from bigtrain.launch import cores
from bigtrain.provenance import code_sha256, differences, versions
from bigtrain.redact import HELD_BACK, redact
from bigtrain.terminal import encoding, outliving, settle

if TYPE_CHECKING:
    from bigtrain.engine.host import HostGroup

lost_terminal: list[str] = []  # of this process
LABELS = "labels.json"  # in the run directory: the names of the numbers that a classifier gives


def main() -> None:
    started = time.time()
    parser = argparse.ArgumentParser(prog="bigtrain.worker")
    parser.add_argument("config", type=Path)
    parser.add_argument("--sha256", required=True, help="of the config file: every rank must read the same")
    arguments = parser.parse_args()
    run_dir, rank = arguments.config.resolve().parent, int(os.environ["RANK"])
    end_with_parent()
    os.environ.pop("WANDB_SERVICE", None)  # wandb's process of whoever started the run: it may end before the run does
    terminal = redirect_output(run_dir, rank)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        heartbeat.start(run_dir, rank)
        config = read_config(arguments.config, arguments.sha256)
        if config.launch.private:
            os.umask(0o077)
        if config.launch.device == "cpu" and config.launch.bind_cores:
            local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or config.launch.ranks or 1)
            cores.bind(int(os.environ.get("LOCAL_RANK", "0")), local_ranks, config.launch.threads_per_rank or 0)
        run(config, run_dir, terminal, stop, started)
    except BaseException as error:
        said = record_failure(run_dir, rank, error)
        if "BIGTRAIN_PARENT_PID" not in os.environ:  # others started it (a pod, a shell): nobody reads the record
            print(f"bigtrain: error: rank {rank}: {said}", file=terminal)
        sys.stderr.flush()
        terminal.flush()
        os._exit(1)  # a plain exit would wait for collectives that never come
    sys.stderr.flush()
    terminal.flush()
    os._exit(0)  # all is written; a library that trips over its own threads on the way out must not fail the run


def run(config: Config, run_dir: Path, terminal: TextIO, stop: threading.Event, started: float) -> None:
    """Build this rank's parts from the config and train."""
    import torch

    from bigtrain import compress, models, privacy, tasks
    from bigtrain.checkpoint import store, transfer
    from bigtrain.data.example_loader import Share
    from bigtrain.engine import optimizers, start
    from bigtrain.engine.host import HostGroup
    from bigtrain.engine.peak import peak_flops
    from bigtrain.hooks import RunInfo, build_hooks
    from bigtrain.models.lora import add_lora
    from bigtrain.plan import preflight
    from bigtrain.trainer import Trainer
    from bigtrain.transform import apply as apply_transforms

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    train = config.train
    device = start.init_distributed("cuda" if config.launch.device == "cuda" else "cpu", config.launch.timeout_seconds)
    host = HostGroup(config.launch.timeout_seconds)
    check_same_software(host, terminal)
    heartbeat.phase(heartbeat.BUILDING)
    if train.deterministic:
        torch.use_deterministic_algorithms(True)
    task = tasks.build(config)
    transforms = compress.build(config)
    parameters = trained = 0

    def build_model() -> torch.nn.Module:
        nonlocal parameters, trained
        torch.manual_seed(train.seed)  # the same weights on every rank and at every world size
        model: Any = task.build_model(config.model)
        parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
        model.set_activation_checkpointing(train.activation_checkpointing)
        new: list[str] = []
        if config.init_from is not None:
            report = transfer.load_initial(model, config.init_from)
            new = report.new
            if int(os.environ["RANK"]) == 0:
                print(redact(transfer.described(report, config.init_from)), file=terminal)
                record = redact(transfer.record(report, config.init_from))
                write_atomic(run_dir / transfer.RECORD, json.dumps(record, ensure_ascii=False, indent=1))
        if train.lora.rank:
            add_lora(model, train.lora, new)
        optimizers.freeze(model, train.freeze)
        model = apply_transforms(transforms, model)
        trained = sum(
            getattr(parameter, "ds_numel", parameter.numel())
            for parameter in model.parameters()
            if parameter.requires_grad
        )
        if train.compile:
            model.compile()
        return model

    private = privacy.begin(config, run_dir)
    built = start.build(config, build_model, device, private)
    for transform in transforms:
        transform.attach(built, host)
    torch.manual_seed(train.seed * 100_003 + host.rank)  # dropout differs from rank to rank
    resumed, damaged = store.choose(run_dir, config.resume, host)
    if host.rank == 0:
        for line in damaged:
            print(f"warning: {line}", file=terminal)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[train.precision]
    info = RunInfo(
        run_dir=run_dir,
        config=config,
        rank=host.rank,
        world_size=host.world_size,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        parameters=parameters,
        flops_per_token=models.flops_per_token(config.model),
        peak_flops=sum(host.gather(peak_flops(device, dtype))),
        tokens_per_step=None
        if isinstance(config.task, LABELLED_TASKS)
        else train.global_batch * config.model.max_seq_len,
        start_step=resumed.step if resumed else 0,
        resumed=resumed is not None,
        hosts=host.gather(socket.gethostname()),
        planned=preflight.predicted(run_dir),
    )
    per_forward = configuration.micro_batch(config, host.world_size)
    share = Share(
        host.rank, host.world_size, train.global_batch, per_forward, train.seed, draw=private.draw if private else None
    )
    hooks = build_hooks(config, host.rank, terminal)
    trainer = Trainer(
        config=config,
        run_dir=run_dir,
        engine=built,
        host=host,
        task=task,
        transforms=transforms,
        share=share,
        hooks=hooks,
        info=info,
        stop=stop,
        privacy=private,
    )
    if host.rank == 0:
        (run_dir / "tokenizer").mkdir(exist_ok=True)  # so that the run stands on its own
        shutil.copyfile(task.tokenizer_file, run_dir / "tokenizer" / "tokenizer.json")
        if config.data.tokenizer.path:  # beside it stands which of its tokens are special, and its chat template
            beside = tokenizer_file(config.data.tokenizer.path).parent
            for name in ("tokenizer_config.json", "chat_template.jinja"):
                with contextlib.suppress(OSError):
                    shutil.copyfile(beside / name, run_dir / "tokenizer" / name)
        if task.labels:
            write_atomic(run_dir / LABELS, json.dumps(task.labels, ensure_ascii=False, indent=1))
        name = "ds_config.json" if config.engine.kind == "deepspeed" else "engine_config.json"
        write_atomic(run_dir / name, json.dumps(redact(built.effective_config()), indent=1, default=str))
    try:
        if resumed:
            heartbeat.phase(heartbeat.RESTORING, resumed.step)
            trainer.restore(resumed)
        result = trainer.fit()
        heartbeat.phase(heartbeat.ENDING)
        result |= (
            task.facts()
            | (private.guarantee.facts(trainer.step) if private else {})
            | info.planned
            | {
                "model/parameters": info.parameters,
                "model/trained_parameters": trained,
                "time/total_seconds": time.time() - started,
                "run": str(run_dir),
                "config_sha256": configuration.fingerprint(config),
                "world_size": host.world_size,
                "restarts": int(os.environ.get("BIGTRAIN_RESTARTS", "0")),
                "versions": versions(),
            }
        )
        if host.rank == 0:
            write_atomic(run_dir / "result.json", json.dumps(result, indent=1))
            if result["status"] == "finished":
                privacy.forget(run_dir)
            hooks.on_end(result)
            hooks.close()
            if warnings := hooks.problems + lost_terminal:
                write_atomic(run_dir / "result.json", json.dumps(result | {"warnings": warnings}, indent=1))
    except BaseException as error:
        hooks.on_failure(error)
        raise
    finally:
        hooks.close()
    host.gather(None)  # nobody leaves before the result is written
    torch.distributed.destroy_process_group()


def check_same_software(host: HostGroup, terminal: TextIO) -> None:
    """Raises BigtrainError on every rank, after a table of the differences on rank 0, if any rank runs other code."""
    mine = (os.environ.get("BIGTRAIN_HOST", socket.gethostname()), {"code": code_sha256()[:12]} | versions())
    table = differences({f"rank {rank} on {name}": made for rank, (name, made) in enumerate(host.gather(mine))})
    if table:
        if host.rank == 0:
            print(table, file=terminal)
        raise BigtrainError("the ranks do not run the same software (the table above says where); install it on all")


def read_config(path: Path, sha256: str) -> Config:
    """Raises BigtrainError if the file is not the one that the command wrote."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise BigtrainError(f"{path}: SHA-256 is {found[:12]}..., the run was started with {sha256[:12]}...")
    secrets = json.loads(os.environ.pop(HELD_BACK, "[]"))
    return configuration.with_secrets(configuration.load(path), secrets)


def redirect_output(run_dir: Path, rank: int) -> TextIO:
    """Send what libraries print to logs/rank-N.log. Returns the terminal, for our own words on rank 0. If it is lost,
    the run goes on, and `lost_terminal` has the line that says so."""
    settle(goes_on=True)

    def lost(error: OSError) -> None:
        lost_terminal.append(f"standard output is lost ({error.strerror or error}); the run went on without it")
        print(lost_terminal[-1], file=sys.stderr)  # into the log

    terminal = outliving(os.dup(1), encoding(), lost)
    (run_dir / "logs").mkdir(exist_ok=True)
    log = os.open(run_dir / "logs" / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    return terminal


def end_with_parent() -> None:
    """No orphans: end when the launcher's process dies, and when the command that started it all does."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    parent = os.environ.get("BIGTRAIN_PARENT_PID")
    if parent is None:
        return
    try:
        handle = os.pidfd_open(int(parent))  # readable once it has ended, a zombie included
    except OSError:
        os._exit(1)

    def watch() -> None:
        select.select([handle], [], [])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def record_failure(run_dir: Path, rank: int, error: BaseException) -> str:
    """For whoever watches the ranks. Returns what went wrong in a line, without secrets."""
    text = str(error) if isinstance(error, BigtrainError) else f"{type(error).__name__}: {error}"
    failure = {"rank": rank, "time": time.time(), "error": " ".join(text.split()), "traceback": traceback.format_exc()}
    failure["expected"] = isinstance(error, BigtrainError)
    failure = redact(failure)
    sys.stderr.write(failure["traceback"])
    try:
        (run_dir / "failures").mkdir(exist_ok=True)
        write_atomic(run_dir / "failures" / f"rank-{rank}.json", json.dumps(failure, indent=1))
    except OSError:
        pass  # the disk may be why we are here; the log has the traceback
    return str(failure["error"])


if __name__ == "__main__":
    main()
