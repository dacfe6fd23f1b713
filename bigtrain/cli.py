"""The `bigtrain` command. Answers `--help` at once: whatever is heavy is imported by the command that needs it.

`train` and `prepare` hand their arguments to Hydra (bigtrain/compose.py); commands that act on a run that exists take
ordinary options. Every failure is one line on stderr and an exit status: 1 for a run that failed, 2 for a wrong
argument, 130 for an interrupt. BIGTRAIN_TRACEBACK=1 shows the traceback too.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import os
import shlex
import signal
import sys
import tempfile
import threading
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bigtrain import __version__, files, foreign, terminal
from bigtrain.config import Config, EncryptionConfig
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.launch import Stopped
from bigtrain.redact import redact

if TYPE_CHECKING:
    from bigtrain.compose import Job

INTERRUPTED = 130
LONG = ("train", "prepare", "verify", "reproduce", "compress", "evaluate")  # that go on when nobody reads them
# With these what is printed is all that there is of a command.
SHOWS = ("--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help", "launch=dryrun", "launch.dry_run=true")
COMPOSED = ("train", "prepare", "verify", "plan")  # the commands whose arguments are Hydra's


def main() -> None:
    """Entry point: run a command, say in one line what went wrong, exit with its status."""
    sys.exit(_settled())


def _settled() -> int:
    told = sys.argv[1:]
    only_shown = any(argument.partition("=")[0] in SHOWS or argument in SHOWS for argument in told)
    terminal.settle(goes_on=told[:1] in [[name] for name in LONG] and not only_shown)
    here = files.enter_somewhere()
    status = _run(sys.argv[1:])
    if not here and not status:
        click.echo("bigtrain: warning: the current directory is gone; this ran in /", err=True)
    return status


def _run(arguments: list[str]) -> int:
    try:
        status = command.main(arguments, prog_name="bigtrain", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except Stopped:
        return 0
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone: `bigtrain ... | head`
        _say_no_more()
        return 1
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except BigtrainError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        if not error.filename:  # of a stream: what it could not take must not be tried again on the way out
            _say_no_more()
        what = error.filename or "a file or a stream could not be read or written"
        return _fail(f"{what}: {error.strerror or error}", 1)
    except Exception as error:
        if isinstance(error, RuntimeError) and "home directory" in str(error):  # Path.expanduser, wherever it is
            return _fail("the home directory is not known: set HOME, or name a path that does not begin with ~", 1)
        return _fail(f"{type(error).__name__}: {error}; this is a bug, {_write_traceback()}", 1)


def _say_no_more() -> None:
    with contextlib.suppress(OSError, ValueError):  # not a stream of the system's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say_problem(message: str) -> None:
    _fail(message, 1)


def _fail(message: str, status: int) -> int:
    if os.environ.get("BIGTRAIN_TRACEBACK") == "1":
        traceback.print_exc()
    click.echo(f"bigtrain: error: {redact(' '.join(message.split()))}", err=True)
    return status


def _write_traceback() -> str:
    """Where the traceback of the exception in hand has been put, in words."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="backslashreplace", prefix="bigtrain-", suffix=".log", delete=False
        ) as file:
            file.write(redact(traceback.format_exc()))
    except OSError:
        return "BIGTRAIN_TRACEBACK=1 shows its traceback"
    return f"its traceback is in {file.name}"


@click.group(name="bigtrain")
@click.version_option(__version__, prog_name="bigtrain")
@click.pass_context
def command(context: click.Context) -> None:
    """Train large models under DeepSpeed ZeRO, from a laptop to a cluster, from one config.

    \b
    bigtrain train                                        the default recipe
    bigtrain train model=llama_20m train.steps=500        change anything
    bigtrain generate RUN --prompt "def main"             write with what was trained
    """
    if context.invoked_subcommand not in COMPOSED:  # what is composed may name any variable, and its ranks see none
        for name in foreign.found(os.environ):
            del os.environ[name]


# ------------------------------------------------------------------------------- commands that compose a run


class ComposedHelp(click.Command):
    """Says what can be composed instead of listing options: all arguments are Hydra's."""

    def format_help(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        from bigtrain.compose import choices
        from bigtrain.config import GROUPS

        formatter.write_usage(context.command_path, "[GROUP=CHOICE | KEY=VALUE | HYDRA FLAG]...")
        formatter.write_paragraph()
        formatter.write_text(self.help or "")
        with formatter.section("Groups and choices"):
            formatter.write_dl([(group, ", ".join(choices(group))) for group in GROUPS])
        with formatter.section("Hydra flags"):
            formatter.write_dl([
                ("--cfg job", "print the composed config and stop"),
                ("-m, --multirun", "a sweep: one run for each combination of KEY=A,B,C"),
                ("--config-dir DIR", "a folder with groups of your own"),
                ("--hydra-help", "all of Hydra's flags"),
            ])  # fmt: skip
        with formatter.section("Examples"):
            formatter.write_dl([
                (f"{context.command_path} train.steps=500 optimizer.lr=1e-3", "two keys changed"),
                (f"{context.command_path} model=llama_20m engine=zero3", "another model, ZeRO-3"),
                (f"{context.command_path} data=text data.path='docs/*.txt'", "your text"),
                (f"{context.command_path} run_dir=runs/a", "run it again to continue it"),
            ])  # fmt: skip


_HYDRA = {"ignore_unknown_options": True, "help_option_names": ["--help", "-h"]}


@command.command(cls=ComposedHelp, context_settings=_HYDRA)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def train(arguments: tuple[str, ...]) -> int:
    """Compose a config, check it, prepare its data, and train."""
    from bigtrain.launch import train as launch

    def run(job: Job) -> float:
        return train_one(job, launch.checked(job.data))

    def train_one(job: Job, config: Config) -> float:
        def continue_command(run_dir: str) -> str:
            kept = [override for override in job.overrides if not override.startswith(("run_dir=", "resume="))]
            return shlex.join(["bigtrain", "train", *redact(kept), f"run_dir={run_dir}", *job.flags])

        return launch.train(config, click.echo, continue_command)

    def trial(job: Job) -> float | list[float]:
        from bigtrain.sweep import run as sweep

        return sweep.run(job, launch.checked, lambda config: train_one(job, config), click.echo, _say_problem)

    return _sweep(arguments, run, trial)


@command.command(cls=ComposedHelp, context_settings=_HYDRA)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def prepare(arguments: tuple[str, ...]) -> int:
    """Compose a config, check it, and prepare its data: what `train` does before it starts the ranks."""
    from bigtrain.launch import train as launch

    def run(job: Job) -> float:
        config = launch.prepare_data(launch.checked(job.data))
        click.echo(f"data: {config.data.prepared_dir}")
        return math.nan

    return _compose(arguments, run)


@command.command(cls=ComposedHelp, context_settings=_HYDRA)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def verify(arguments: tuple[str, ...]) -> int:
    """Compose a config and find out whether it can be trusted here: some steps of it against the reference engine,
    then killed and resumed, bit for bit. Exit status 1 if not."""
    from bigtrain.launch import train as launch

    def run(job: Job) -> float:
        from bigtrain.verify import verify as check

        check(launch.checked(job.data), click.echo)
        return math.nan

    return _compose(arguments, run)


@command.command(cls=ComposedHelp, context_settings=_HYDRA)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def plan(arguments: tuple[str, ...]) -> int:
    """Compose a config as `train` does and say what it would need: memory, time, money, energy. Starts nothing.

    \b
    Keys of its own, beside those of the config:
      cluster=h100x64     a preset and how many of its devices, or a yaml file; default: this machine
      tokens=1e12         plan the run for so many tokens
      goal=time           search for the best way to run it: time, cost or memory
      hours=, budget=     what model, on how many tokens, that buys
      target_loss=        how long until the loss is that low
      explain=true        the formula and source of each number
      verify=true         hold the memory to the real engine, on tensors that take none
      simulate=true       the step event by event, scaling, and failures over the run's days
      output=json         for scripts
      report=true         a page of HTML with pictures, in out=DIR
    """
    from bigtrain.launch.train import checked
    from bigtrain.plan import command as planning

    options, rest = planning.split(list(arguments))
    return _compose(tuple(rest), lambda job: planning.run(checked(job.data), options, click.echo))


def _sweep(arguments: tuple[str, ...], run: Callable[[Job], float], trial: Callable[[Job], float | list[float]]) -> int:
    """Train what is composed: one run, or the trials of a sweep, and then show what came out of them. Exit status."""
    from bigtrain import compose

    directories: list[Path] = []
    command = os.environ["BIGTRAIN_SWEEP"] = uuid.uuid4().hex
    failed = False
    _end_on_sigterm()
    try:
        compose.run(list(arguments), lambda job: trial(job) if job.sweep else run(job), directories.append)
    finally:
        for directory in directories:
            from bigtrain.sweep import results

            failed = not results.show(directory, command, click.echo)
    return 1 if failed else 0


def _end_on_sigterm() -> None:
    if threading.current_thread() is threading.main_thread():  # so that SIGTERM cleans up as Ctrl-C does
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@dataclass
class Outcome:
    """What became of one job of a sweep."""

    job: Job
    objective: float
    problem: str | None


def _compose(arguments: tuple[str, ...], run: Callable[[Job], float]) -> int:
    """Run each composed job; in a sweep a failure is kept for the summary and the next job starts. Exit status."""
    from bigtrain import compose

    outcomes: list[Outcome] = []

    def job(job: Job) -> float:
        if job.number is None:
            return run(job)
        click.echo(f"job {job.number}: {redact(' '.join(job.overrides))}")
        try:
            outcomes.append(Outcome(job, run(job), None))
        except (Stopped, KeyboardInterrupt):
            outcomes.append(Outcome(job, math.nan, "stopped"))
            raise KeyboardInterrupt from None  # ends the sweep; it is not done, even if this job has saved itself
        except Exception as error:
            message = str(error) if isinstance(error, BigtrainError) else f"{type(error).__name__}: {error}"
            _fail(f"job {job.number}: {message}", 1)
            outcomes.append(Outcome(job, math.nan, f"failed: {message}"))
        return outcomes[-1].objective

    _end_on_sigterm()
    try:
        compose.run(list(arguments), job)
    finally:
        _summarise(outcomes)
    return 1 if any(outcome.problem is not None for outcome in outcomes) else 0


def _summarise(outcomes: list[Outcome]) -> None:
    if outcomes:
        good = sum(outcome.problem is None for outcome in outcomes)
        click.echo(f"sweep: {good} of {len(outcomes)} jobs finished")
    for outcome in outcomes:
        result = outcome.problem or f"{outcome.objective:.6g}"
        click.echo(f"  {outcome.job.number}  {redact(' '.join(outcome.job.overrides))}  {redact(result)}")


# --------------------------------------------------------------------------------- commands that act on a run

RUN = click.Path(exists=True, file_okay=False, path_type=Path)
MAX_MEMORY = click.option(
    "--max-memory",
    multiple=True,
    metavar="DEVICE=SIZE",
    help="At most that of the model on it: cpu=8GiB, 0=20GiB (a GPU); may repeat. The rest goes to disk.",
)


@command.command()
@click.argument("run", type=RUN)
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; may repeat. `-` or none: lines of stdin.")
@click.option("--max-new-tokens", default=100, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0), help="0: greedy.")
@click.option("--top-k", type=click.IntRange(min=1), help="Sample from the K likeliest tokens only.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from the likeliest, P in all.")
@click.option("--num-beams", default=1, show_default=True, type=click.IntRange(min=1), help="Beam search if above 1.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@MAX_MEMORY
@click.option("--jsonl", is_flag=True, help="Print a JSON object a line: prompt, text, tokens, finish_reason.")
def generate(run: Path, prompts: tuple[str, ...], max_memory: tuple[str, ...], jsonl: bool, **options: Any) -> None:
    """Write on from a prompt with the model of RUN; an encoder-decoder translates it, a chat model answers it.

    Of lines of stdin each gives one line, in their order: a blank one a blank one, and line breaks are written \\n.
    """
    lines = not prompts or "-" in prompts
    texts: list[str] = []
    for prompt in prompts or ("-",):
        texts += _stdin_lines() if prompt == "-" else [prompt]
    if not texts:
        raise click.UsageError("no prompt; give --prompt TEXT or lines on stdin")
    from bigtrain import generate as generation
    from bigtrain.checkpoint import inference

    memory = inference.parse_memory(max_memory)
    written, continues = generation.write(run, texts, skip_blank=lines, max_memory=memory, **options)
    if jsonl:
        click.echo("\n".join(json.dumps(one.as_json(), ensure_ascii=False) for one in written))
        return
    shown = [one.shown(continues) for one in written]
    if lines:
        click.echo("\n".join(text.replace("\r", "\\r").replace("\n", "\\n") for text in shown))
    else:
        click.echo("\n\n".join(shown))


def _stdin_lines() -> list[str]:
    """The lines of standard input, which are UTF-8 whatever the locale is; only line feeds part them, with or without
    a carriage return before. Raises ConfigError naming the first line that is not UTF-8."""
    data = sys.stdin.buffer.read().removeprefix(codecs.BOM_UTF8) if sys.stdin else b""  # None: closed
    texts: list[str] = []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n") if data else [], 1):
        try:
            texts.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            found = f"line {number}, byte {error.start + 1}"
            raise ConfigError("stdin", found, "is not UTF-8 text", "convert it: iconv -t utf-8") from None
    return texts


@command.command()
@click.argument("runs", nargs=-1, required=True, type=RUN)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder to write to; default: RUN/report, ./report for several."
)
@click.option("--ladder", is_flag=True, help="Fit a scaling law to RUNS (or sweeps of them): also ladder.json.")
def report(runs: tuple[Path, ...], out: Path | None, ladder: bool) -> None:
    """Draw the curves of one RUN, or several side by side: a self-contained HTML page and PNGs."""
    if ladder:
        from bigtrain import scaling

        page, found = scaling.write(list(runs), out)
        click.echo("\n".join([*scaling.lines(found), str(page)]))
        return
    from bigtrain.report import write_report

    click.echo(write_report(list(runs), out))


@command.command()
@click.argument("run", type=RUN)
@click.option("--data", multiple=True, help="File to measure on, which may repeat. Default: RUN's held-out data.")
@click.option("--column", "columns", multiple=True, metavar="NAME=COLUMN", help="Which column holds text, label ...")
@click.option("--batch", default=32, show_default=True, type=click.IntRange(min=1), help="Examples at a time.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@MAX_MEMORY
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write to; default: RUN/evaluation.")
@click.option("--lm-eval", metavar="TASK[,TASK]", help="Instead: tasks of EleutherAI's lm-evaluation-harness.")
@click.option(
    "--include-path", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR",
    help="With --lm-eval: a folder with tasks of your own.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), help="With --lm-eval: so many examples of each task.")
def evaluate(
    run: Path, data: tuple[str, ...], columns: tuple[str, ...], batch: int, device: str, max_memory: tuple[str, ...],
    out: Path | None, lm_eval: str | None, include_path: Path | None, limit: int | None,
) -> None:  # fmt: skip
    """Measure the model of RUN: a table with confidence intervals, metrics.json and predictions.jsonl."""
    if lm_eval is not None:
        if data or columns or max_memory:
            raise click.UsageError("--lm-eval brings its own data: no --data, --column or --max-memory")
        from bigtrain import harness

        names = [name for part in lm_eval.split(",") if (name := part.strip())]
        if not names:
            raise click.UsageError("--lm-eval names no task")
        results, file = harness.run(
            run, names, include=include_path, limit=limit, batch=batch, device=device, out=out
        )  # fmt: skip
        click.echo(harness.table(results))
        click.echo(file)
        return
    if include_path is not None or limit is not None:
        raise click.UsageError("--include-path and --limit need --lm-eval")
    pairs = _columns(columns)
    from bigtrain import evaluate as evaluation
    from bigtrain.checkpoint import inference

    metrics, written = evaluation.run(
        run, data=list(data), columns=pairs, batch=batch, device=device,
        max_memory=inference.parse_memory(max_memory), out=out,
    )  # fmt: skip
    click.echo(evaluation.table(metrics))
    click.echo(written)


def _columns(columns: tuple[str, ...]) -> dict[str, str | int]:
    pairs: dict[str, str | int] = {}
    for column in columns:
        name, equals, value = column.partition("=")
        if not equals or not value:
            raise click.UsageError(f"--column {column}: NAME=COLUMN is wanted")
        pairs[name] = int(value) if value.isdigit() else value  # a file without a header: columns by number
    return pairs


@command.command()
@click.argument("run", type=RUN)
@click.option(
    "--format", "format", default="huggingface", show_default=True,
    type=click.Choice(["huggingface", "compressed-tensors", "torchao", "onnx"]),
)  # fmt: skip
@click.option(
    "--quantize", type=click.Choice(["int8_dynamic", "int8", "int4", "gptq_int4", "awq_int4"]),
    help="What to make of the weights, in a format of quantized ones. A run that trained with quantization has them.",
)  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to make; new or empty.")
@click.option("--encrypt", is_flag=True, help="Encrypt the weights, by default with the key of RUN's checkpoints.")
@click.option("--key-file", help="With --encrypt: a file that holds the key.")
@click.option("--key-env", help="With --encrypt: the environment variable that holds the key.")
def export(
    run: Path, format: str, quantize: str | None, out: Path, encrypt: bool, key_file: str | None, key_env: str | None
) -> None:  # fmt: skip
    """Write the model of RUN as a directory that transformers loads: weights, config, tokenizer, model card. Other
    formats are loaded again and measured: what quantization has changed is printed."""
    if (key_file or key_env) and not encrypt:
        raise click.UsageError("--key-file and --key-env need --encrypt")
    from bigtrain import export as exporting

    if format == "huggingface":
        if quantize:
            raise ConfigError("--quantize", quantize, "format huggingface holds no integers", "take compressed-tensors")
        click.echo(exporting.export(run, out, encrypt, EncryptionConfig(key_file, key_env), click.echo))
        return
    if encrypt:
        raise ConfigError("--encrypt", True, f"format {format} is read by programs that have no key", "leave it out")
    from bigtrain.compress import exported

    written, measured = exporting.export_quantized(run, out, format, quantize)
    click.echo("\n".join(exported.table(measured, format)))
    click.echo(written)


@command.command()
@click.argument("run", type=RUN)
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to make; new or empty.")
@click.option("--by", default="taylor", show_default=True, type=click.Choice(["magnitude", "taylor", "activation"]),
              help="What tells which heads, neurons, layers and columns matter.")  # fmt: skip
@click.option("--calibration-batches", default=8, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--recover-steps",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Train what was cut or pruned on so long.",
)
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), help="Of that; default: RUN's own.")
@click.option("--distil", is_flag=True, help="Let that learn from the dense model too.")
@click.option("--task", help="What a Hugging Face directory is for; default: as its config.json says.")
@click.option("--data", multiple=True, help="... and its data; may repeat. Default: the standard library's source.")
@click.option("--held-out", multiple=True, help="... and what to measure on. Default: a part of --data.")
@click.option("--column", "columns", multiple=True, metavar="NAME=COLUMN", help="Which column holds text, label ...")
@click.option("--watts", type=click.FloatRange(min=0, min_open=True), help="Of this machine at work, for energy.")
@click.option("--compile", is_flag=True, help="Time what torch.compile makes of the models.")
def compress(run: Path, recipes: tuple[str, ...], out: Path, columns: tuple[str, ...], **options: Any) -> None:
    """Make the model of RUN (or of a Hugging Face directory) smaller by each RECIPE, and measure what comes of it.

    A recipe is steps joined by +. A number in it says how much is removed, below 1 a fraction, else that many:
    heads=0.25 removes a quarter of each layer's heads and keeps the rest, layers=2 removes two layers; neurons=0.5 (of
    each layer) and dim=64 (columns of the hidden state) likewise. magnitude=0.5 and wanda=0.5 set half of the weights
    to zero, nm=2:4 all but 2 of each 4 neighbours. int8, int4 and int8_dynamic write linear layers as integers.

    OUT/RECIPE is a directory that other commands take for a run; the table is of the files in it.
    """
    from bigtrain.post_training import command as compression

    given = compression.Options(columns=tuple(_columns(columns).items()), **options)
    compression.run(run, recipes, out, given, click.echo)
    click.echo(out / "index.html")


@command.command()
@click.argument("directory", type=RUN)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to make; new or empty.")
def decrypt(directory: Path, out: Path) -> None:
    """Write the files of an encrypted checkpoint or export in the clear, readable for you alone."""
    from bigtrain import encryption

    if not encryption.is_encrypted(directory):
        raise ConfigError("DIRECTORY", str(directory), "is not encrypted")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError("out", str(out), "exists already", "name a directory that is new or empty")
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.umask(0o077)
    encryption.decrypt_into(directory, out)
    click.echo(out)


@command.group(name="checkpoint")
def checkpoint_group() -> None:
    """List, verify or thin out the checkpoints of a run."""


@checkpoint_group.command("list")
@click.argument("run", type=RUN)
def list_checkpoints(run: Path) -> None:
    """Show each checkpoint of RUN: step, time, size, ranks, ZeRO stage, metric, why it is kept."""
    from bigtrain.checkpoint import inspect

    click.echo(inspect.table(run))


@checkpoint_group.command("verify")
@click.argument("run", type=RUN)
@click.option("--set-aside", is_flag=True, help="Rename damaged ones to step-N.bad, so that the one before is used.")
def verify_checkpoints(run: Path, set_aside: bool) -> int:
    """Read every byte of RUN's checkpoints and compare it with the manifest. Exit status 1 if any is damaged."""
    from bigtrain.checkpoint import inspect

    return 0 if inspect.verify(run, set_aside, click.echo) else 1


@checkpoint_group.command()
@click.argument("run", type=RUN)
@click.option("--keep", type=click.IntRange(min=1), help="So many of the newest; default: as RUN's config says.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
def prune(run: Path, keep: int | None, dry_run: bool) -> None:
    """Remove the checkpoints of RUN that its config (train.keep_...) does not keep."""
    from bigtrain.checkpoint import inspect

    inspect.prune(run, keep, dry_run, click.echo)


@command.command()
@click.argument("run", type=RUN)
@click.option("--steps", type=click.IntRange(min=1), help="Only the first N steps. Default: all that RUN has.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the new run. Default: RUN-reproduced.")
@click.option(
    "--tolerance", default=0.0, show_default=True, type=click.FloatRange(min=0), help="Relative. 0: the same bits."
)
@click.option("--other-code", is_flag=True, help="Go on although bigtrain's sources are not those that made RUN.")
def reproduce(run: Path, steps: int | None, out: Path | None, tolerance: float, other_code: bool) -> None:
    """Run RUN again, deterministically, in a new directory, and compare the two curves. Exit status 1: they differ."""
    from bigtrain.reproduce import reproduce as again

    run = run.resolve()
    again(run, out or run.with_name(f"{run.name}-reproduced"), steps, tolerance, other_code, click.echo)


@command.command()
@click.argument("first", type=RUN)
@click.argument("second", type=RUN)
def diff(first: Path, second: Path) -> None:
    """Show where two runs differ: config, code, machine, data, curves."""
    from bigtrain.diff import diff as compare

    click.echo("\n".join(compare(first, second)))


@command.command()
@click.argument("run", type=RUN)
@click.option("--text", required=True, help="What the model is to judge, or to write on from.")
@click.option("--pair", help="The second text, of a classifier of pairs.")
@click.option("--target", metavar="LABEL", help="Explain this label, or next token; default: what the model says.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write to; default: RUN/inspection.")
def inspect(run: Path, text: str, pair: str | None, target: str | None, device: str, out: Path | None) -> None:
    """Why does the model of RUN say that of TEXT? Attributions and attention maps, as an HTML page and PNGs."""
    from bigtrain import inspect as inspection

    found, page = inspection.run(run, text, pair=pair, target=target, device=device, out=out)
    click.echo(inspection.summary(found))
    click.echo(page)


@command.command()
@click.argument("run", type=RUN)
@click.option("--once", is_flag=True, help="Print it one time, for scripts. So it is where there is no terminal.")
def watch(run: Path, once: bool) -> int:
    """See a running job live, from the files it writes: progress, loss, speed, warnings. Exit status 1: it failed."""
    from rich.console import Console

    from bigtrain.watch import watch as show

    return 1 if show(run, once, Console()).status == "failed" else 0


@command.command()
@click.argument("directory", default="runs", type=RUN)
def runs(directory: Path) -> None:
    """List the runs under DIRECTORY: status (running, finished, stopped, failed, stalled), step, best loss, age."""
    from bigtrain import runs as found

    states = [found.state(path) for path in found.find(directory)]
    click.echo("\n".join(found.table(states, directory)) if states else f"no runs in {directory}")


@command.command()
@click.option("--build", is_flag=True, help="Compile DeepSpeed's native ops now instead of at first use.")
@click.option("--launch", type=click.Choice(["hostfile", "slurm"]), help="Look at every node of a cluster instead.")
@click.option("--hostfile", metavar="FILE", help="With --launch hostfile: lines of `host slots=N`.")
@click.option("--ssh-config", metavar="FILE", help="With --launch hostfile: for ssh -F.")
@click.option(
    "--cluster-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Measure into FILE, for plan cluster=FILE: this machine, or with --launch the network.",
)
def doctor(
    build: bool, launch: str | None, hostfile: str | None, ssh_config: str | None, cluster_file: Path | None
) -> int:
    """Show what this machine has and what is missing. Exit status 1 if something needed is."""
    if launch is not None:
        from bigtrain.launch.ways import examine_cluster

        return 0 if examine_cluster(launch, hostfile, ssh_config, cluster_file, click.echo) else 1
    if hostfile or ssh_config:
        raise click.UsageError("--hostfile and --ssh-config need --launch")
    if cluster_file is not None:
        from bigtrain.measure import described, write_cluster_file

        click.echo(described(write_cluster_file(cluster_file)))
        click.echo(cluster_file)
        return 0
    from bigtrain.doctor import examine

    return 0 if examine(build) else 1


if __name__ == "__main__":
    main()
