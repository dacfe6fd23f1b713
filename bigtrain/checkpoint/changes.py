"""What has changed since a run was saved: the one place that decides what may.

Each field of the config is free to change, or listed when it has, or a change that `resume_allow` must name, because
the run then is another one than its first part, or refused, because what was learned would not fit or would mean
something else. Nothing here needs torch: the command asks before any rank starts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bigtrain import config as schema
from bigtrain.checkpoint.find import Checkpoint
from bigtrain.config import LABELLED_TASKS, Config
from bigtrain.errors import NO_VALUE, ConfigError, nearest

# Where and how a run is executed and watched, and how long it lasts. The schedule's warm-up may follow train.steps, as
# it does in the default recipe.
_FREE = (
    "run_dir", "resume", "resume_allow", "launch", "logger", "schedule.warmup_steps",
    "train.encryption", "data.prepared_dir", "data.cache_dir", "data.workers",
    "train.steps", "train.micro_batch", "train.activation_checkpointing", "train.compile", "train.eval_every",
    "train.eval_batches", "train.save_every", "train.async_save", "train.keep_checkpoints", "train.keep_every",
    "train.keep_best", "train.objective", "train.stop_at", "train.guard",
    "train.tokens_per_parameter", "train.profile",
)  # fmt: skip
# The same sums in another order: state is cut anew (checkpoint/reshard.py). And when a transform acts, which may follow
# train.steps; what is pruned stays so.
_LISTED = ("engine", "compress.prune.schedule", "compress.quantize.start", "compress.quantize.freeze")
_REFUSED = {
    "model.dropout": None,  # (None: it is not)
    "model.rope_theta": "positions would mean something else to the weights",
    "model.rope_scaling": "positions would mean something else to the weights",
    "model": "the weights would not fit",
    "task.kind": "another head and another loss",
    "data.tokenizer.path": None,  # the tokenizer itself is compared
    "data.tokenizer": "token numbers would mean other text",
    "optimizer.kind": "its states would mean nothing to another optimizer",
    "train.seed": "the order of the data follows it: samples would be seen again and others never",
    "train.lora": "the weights would not fit",
    "train.privacy": "the epsilon is that of one noise, one clipping norm and one set of examples",
    "train.freeze": "what is trained has states, what is frozen has none",
    "compress": "the weights would mean something else",
    "init_from": "the run has weights of its own already",
}
_QUANTIZED = "compress.quantize"  # what is learned in a run's dense part stays, to be rounded from here on
_SHOWN = 3  # differences in an error's line

Verdict = Literal["listed", "named", "refused"]


@dataclass(frozen=True)
class Change:
    field: str
    before: Any
    now: Any
    verdict: Verdict
    why: str = ""

    def __str__(self) -> str:
        return f"{self.field} is {self.before} there, {self.now} here"


def compare(before: Config, now: Config) -> list[Change]:
    """Every difference but those of no consequence, in the order of the fields."""
    old, new = schema.flatten(schema.public(before)), schema.flatten(schema.public(now))  # as config.yaml has them
    if now.model.vocab_size is None:  # follows the tokenizer, which is not made yet
        new["model.vocab_size"] = old.get("model.vocab_size")
    if before.data.prepared_dir and now.data.prepared_dir:  # named by a fingerprint of content and tokenizer
        old["data (fingerprint)"], new["data (fingerprint)"] = (
            Path(config.data.prepared_dir or "").name for config in (before, now)
        )
        if now.train.privacy.enabled:
            old["train.privacy (examples)"], new["train.privacy (examples)"] = (
                config["data (fingerprint)"] for config in (old, new)
            )
    if now.train.privacy.target_epsilon is not None:  # which the noise follows from
        old["train.privacy (train.steps)"], new["train.privacy (train.steps)"] = before.train.steps, now.train.steps
    if before.compress.quantize is None and now.compress.quantize is not None:
        new = {name: value for name, value in new.items() if not _within(name, (_QUANTIZED,))}
        new[_QUANTIZED] = f"int{now.compress.quantize.bits}"
    return [
        _judged(key, old.get(key), new.get(key), now)
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and not _within(key, _FREE)
    ]


def _judged(key: str, before: Any, now: Any, config: Config) -> Change:
    if _within(key, _LISTED):
        return Change(key, before, now, "listed")
    if key == _QUANTIZED:
        return Change(key, before, now, "named")
    if key == "train.global_batch" and isinstance(config.task, LABELLED_TASKS):
        why = "examples are grouped by length over many batches: some would be seen again and others never"
        return Change(key, before, now, "refused", why)
    for prefix, reason in _REFUSED.items():  # the longer ones come first
        if _within(key, (prefix,)):
            return Change(key, before, now, "refused", reason) if reason else Change(key, before, now, "named")
    return Change(key, before, now, "named")


def check(before: Config, now: Config, other: str | None = None) -> list[Change]:
    """The differences between the config that a checkpoint or run directory was made with and `now`, all allowed.

    `other`: the checkpoint that resume= names, where it is not the run directory's own.
    Raises ConfigError naming those that are refused, or that `resume_allow` does not name.
    """
    found = compare(before, now)
    _check_names(before, now)
    refused = [change for change in found if change.verdict == "refused"]
    unnamed = [change for change in found if change.verdict == "named" and not _within(change.field, now.resume_allow)]
    wrong = refused + unnamed
    if not wrong:
        return found
    shown = ", ".join(map(str, wrong[:_SHOWN])) + (f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else "")
    if refused:
        shown += f": {refused[0].why}"
        way_out = "name another run_dir" if other is None else "name a checkpoint of such a run, or take init_from="
    else:
        names = dict.fromkeys(change.field.split(" ")[0] for change in unnamed)
        way_out = f"to continue it all the same resume_allow=[{','.join(names)}], else name another run_dir"
    if other is None:
        raise ConfigError("run_dir", now.run_dir, f"holds another run ({shown})", way_out)
    raise ConfigError("resume", other, f"is of another run ({shown})", way_out)


def _check_names(before: Config, now: Config) -> None:
    fields = {*schema.flatten(schema.to_dict(before)), *schema.flatten(schema.to_dict(now))}
    for name in now.resume_allow:
        if not any(_within(field, (name,)) for field in fields):
            near = nearest(name, fields)
            raise ConfigError("resume_allow", name, "no such field", f"did you mean {near}?" if near else "")


def check_tokenizer(run_dir: Path, prepared_dir: str | None) -> None:
    """Raises ConfigError if the data was tokenized by another tokenizer than the one that the run has kept."""
    ours, theirs = (_sha256(Path(path) / "tokenizer.json") for path in (run_dir / "tokenizer", prepared_dir or ""))
    if ours and theirs and ours != theirs:
        raise ConfigError(
            "data.tokenizer", NO_VALUE, f"{run_dir} was trained with another tokenizer: token numbers would mean"
            " other text", f"take the run's own, data.tokenizer.path={run_dir}, or name another run_dir",
        )  # fmt: skip


def _sha256(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def recorded(config: Config) -> dict[str, Any]:
    """What a checkpoint's manifest keeps of the config, to be compared with a later one."""
    data = schema.public(config)  # without secrets
    return {key: value for key, value in data.items() if key not in ("launch", "logger")}


def config_of(checkpoint: Checkpoint) -> Config | None:
    """The config that a checkpoint was saved under; None if it keeps none that this version can read."""
    try:
        if "config" in checkpoint.manifest:
            return schema.from_dict(checkpoint.manifest["config"])
        return schema.load(checkpoint.path.parents[1] / "config.yaml")
    except ConfigError:
        return None


def listing(changes: list[Change], checkpoint: Checkpoint, ranks: int) -> str:
    """A block for the person: what is different from here on. Empty where nothing is."""
    rows = [(change.field, str(change.before), str(change.now)) for change in changes]
    saved = checkpoint.manifest.get("world_size", ranks)
    if saved != ranks:
        rows.append(("ranks", str(saved), str(ranks)))
    if not rows:
        return ""
    wide = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"  {field:<{wide[0]}}  {before:<{wide[1]}} -> {now}" for field, before, now in rows]
    return "\n".join([f"since {checkpoint.path} was saved:", *lines])


def is_free(key: str) -> bool:
    """Whether a field may change within a run without a word: how long it lasts, where it runs, how it is watched."""
    return _within(key, _FREE)


def _within(key: str, names: tuple[str, ...] | list[str]) -> bool:
    """Whether `key` is one of `names` or lies in one."""
    return any(key == name or key.startswith((f"{name}.", f"{name} (")) for name in names)
