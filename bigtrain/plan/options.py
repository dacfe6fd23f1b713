"""What `bigtrain plan` is asked beside the config of the run: keys of its own, typed and checked like the config's."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import yaml

from bigtrain import config as schema
from bigtrain.config import GROUPS, Config
from bigtrain.errors import NO_VALUE, ConfigError, nearest


@dataclass
class Options:
    """The keys that only `plan` has."""

    cluster: str = "here"  # a preset, PRESETxDEVICES, a yaml file; here: this machine
    output: Literal["table", "json"] = "table"
    explain: bool = False  # show each number's formula and source
    verify: bool = False  # run the real engine on tensors without memory, and compare
    report: bool = False  # write a page of HTML with pictures
    out: str = "plan"  # the folder it goes to
    simulate: bool = False  # a step and the run's days, event by event
    jitter: float = 0.02  # of a rank's computing in a step: standard deviation, as a fraction of the mean
    # Mean time between failures of one device with its share of the node; null: that of Llama 3's training, 5.8 years.
    mtbf_hours: float | None = None
    goal: Literal["none", "time", "cost", "memory"] = "none"  # search for the best way to run it
    tokens: float | None = None  # of the whole run; null: train.steps
    hours: float | None = None  # a budget of time: what model and how many tokens it buys
    budget: float | None = None  # a budget in US dollars
    target_loss: float | None = None  # nats per token to reach
    ladder: str | None = None  # runs of small models, to fit the loss of larger ones to


NAMES = tuple(each.name for each in fields(Options))


def split(arguments: list[str]) -> tuple[Options, list[str]]:
    """`plan`'s own keys and the rest, which is for `train`'s config. Raises ConfigError."""
    given: dict[str, object] = {}
    rest = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if equals and key in NAMES:
            given[key] = text if key in ("cluster", "out", "ladder") else _value(key, text)
        elif equals and key.isidentifier() and key not in _TRAINS and (near := nearest(key, [*NAMES, *_TRAINS])):
            raise ConfigError(key, NO_VALUE, "unknown key", f"did you mean {near}?")
        else:
            rest.append(argument)
    try:
        options = schema.section(Options, given, "plan")
    except ConfigError as error:
        raise ConfigError(error.field.removeprefix("plan."), error.value, error.problem, error.way_out) from None
    for name in ("tokens", "hours", "budget", "target_loss"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(name, value, "must be above 0")
    if not 0 <= options.jitter <= 1:
        raise ConfigError("jitter", options.jitter, "must be from 0 to 1")
    if options.mtbf_hours is not None and not 0.01 <= options.mtbf_hours <= 1e9:
        raise ConfigError("mtbf_hours", options.mtbf_hours, "must be from 0.01 to 1e9 hours")
    return options, rest


_TRAINS = {each.name for each in fields(Config)} | set(GROUPS)


def _value(key: str, text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(key, text, "cannot be read") from None
