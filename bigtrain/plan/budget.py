"""What a budget buys: the largest model that fits, the best size and token count for so many hours or dollars, and how
many tokens lead to a loss. recommend.py answers the other way round.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from bigtrain.config import Config, DecoderConfig
from bigtrain.errors import ConfigError
from bigtrain.law import Law
from bigtrain.plan import flops, money, step_time
from bigtrain.plan import sizes as parameter_sizes
from bigtrain.plan.clusters import Cluster
from bigtrain.plan.recommend import Candidate, priced, room, ways_to_run


def shaped_like(config: Config, dim: int) -> Config:
    """The same architecture at another width: head size, aspect ratio (layers / dim) and feed-forward ratio are kept.

    Raises ConfigError for what is no decoder.
    """
    model = config.model
    if not isinstance(model, DecoderConfig):
        raise ConfigError("model.kind", model.kind, "only decoders are scaled")
    heads = max(1, round(model.n_heads * dim / model.dim))
    groups = model.n_heads // (model.n_kv_heads or model.n_heads)
    heads = max(groups, heads // groups * groups)
    wide = round(heads * model.dim / model.n_heads)
    ratio = (model.ffn_dim or 4 * model.dim) / model.dim
    scaled = replace(
        model,
        dim=wide,
        n_heads=heads,
        n_kv_heads=None if model.n_kv_heads is None else heads // groups,
        n_layers=max(1, round(model.n_layers * wide / model.dim)),
        ffn_dim=None if model.ffn_dim is None else max(64, round(ratio * wide / 64) * 64),
    )
    return replace(config, model=scaled)


def overrides(config: Config) -> str:
    """What turns the model that a config was scaled from into its own, on `train`'s command line."""
    model = flops.our_model(config.model)
    values = {name: getattr(model, name) for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim")}
    return " ".join(f"model.{name}={value}" for name, value in values.items() if value is not None)


def _parameters(config: Config) -> int:
    return parameter_sizes.of_model(flops.our_model(config.model)).total


def _with_heads(config: Config, heads: int) -> Config:
    model = flops.our_model(config.model)
    return shaped_like(config, round(heads * model.dim / model.n_heads))


def shaped_for(config: Config, parameters: float) -> Config:
    """The architecture at the width whose parameter count is nearest."""
    low, high = 1, 2
    while _parameters(_with_heads(config, high)) < parameters and high < 4096:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _parameters(_with_heads(config, middle)) < parameters:
            low = middle
        else:
            high = middle
    ways = [_with_heads(config, heads) for heads in (low, high)]
    return min(ways, key=lambda each: abs(math.log(_parameters(each) / parameters)))


def largest_model(config: Config, cluster: Cluster) -> Candidate:
    """The widest model of the config's family that some way fits into all of the cluster's devices.

    Raises ConfigError if not even the narrowest does.
    """
    ranks = cluster.devices

    def fits(heads: int) -> Candidate | None:
        shaped = _with_heads(config, heads)
        sizes = parameter_sizes.of_run(shaped)
        ways = list(ways_to_run(shaped, cluster, ranks))
        # Of the stages that the optimizer takes the highest needs least.
        stage = max((getattr(way.engine, "stage", 0) for way in ways), default=0)
        for way in ways:
            saves = way.train.activation_checkpointing and way.train.micro_batch == 1
            if saves and getattr(way.engine, "stage", 0) == stage:
                needed = room(way, cluster, ranks, sizes)
                if needed.fits:
                    return priced(config, way, cluster, ranks, needed, 1.0, sizes)
        return None

    best, low, high = fits(1), 1, 2
    if best is None:
        raise ConfigError("cluster", cluster.name, "not even the narrowest model of this shape fits")
    while (found := fits(high)) is not None and high < 4096:
        best, low, high = found, high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        found = fits(middle)
        if found is None:
            high = middle
        else:
            best, low = found, middle
    return best


@dataclass(frozen=True)
class FittedLaw(Law):
    """A law, how sure it is, and where: at the budget in the middle of the runs that it was fitted on it is taken for
    exact, and further away its constants may be off by their standard errors."""

    middle_flops: float
    E_error: float = 0.0  # 0: not known
    a_error: float = 0.0
    b_error: float = 0.0

    @property
    def known(self) -> bool:
        """Whether there are intervals."""
        return max(self.E_error, self.a_error, self.b_error) > 0


# Approach 3 as Epoch AI corrected it, with its standard errors (arXiv 2404.10102, section 3), on runs of 6e18 to 3e21.
CHINCHILLA = FittedLaw(
    E=1.8172, A=482.01, a=0.3478, B=2085.43, b=0.3658, middle_flops=1e20, E_error=0.03, a_error=0.02, b_error=0.02
)
MOST_LOG = 100.0  # of an interval's end over its middle: beyond it nothing is known
DEVIATIONS = 1.645  # between the middle and the ends of a ladder's intervals, 5% and 95% of bootstraps


@dataclass(frozen=True)
class Optimum:
    """How to spend a budget of operations, each with the interval of one standard error."""

    flops: float
    parameters: float
    parameters_interval: tuple[float, float]
    tokens: float
    tokens_interval: tuple[float, float]
    loss: float


def compute_optimal(budget_flops: float, law: FittedLaw = CHINCHILLA) -> Optimum:
    """The size and tokens with the least loss for C = 6 N D operations (arXiv 2203.15556, section 3.3 and equation 4).

    The optimal size grows as C^(b / (a + b)); the interval lets that exponent be off by its standard error from the
    middle of the fitted runs on (by 1 at most, since it is a share): the further away, the wider.
    Raises ConfigError for no budget.
    """
    if not budget_flops > 0:
        raise ConfigError("budget", budget_flops, "must be above 0")
    parameters, tokens = law.best_split(budget_flops)
    error = min(1.0, math.hypot(law.b * law.a_error, law.a * law.b_error) / (law.a + law.b) ** 2)
    spread = max(budget_flops / law.middle_flops, law.middle_flops / budget_flops) ** error
    return Optimum(
        budget_flops, parameters, (parameters / spread, parameters * spread), tokens,
        (tokens / spread, tokens * spread), law.loss(parameters, tokens),
    )  # fmt: skip


@dataclass(frozen=True)
class Purchase:
    """What a budget is best spent on."""

    optimum: Optimum
    config: Config  # the architecture at the width that comes nearest
    parameters: int
    hours: float
    cost: float
    time: step_time.StepTime


def hours_for_dollars(dollars: float, cluster: Cluster) -> float:
    """Of all of the cluster's devices. Raises ConfigError for no money, and for a cluster without a price."""
    if not dollars > 0:
        raise ConfigError("budget", dollars, "must be above 0", "US dollars")
    if not cluster.price_per_device_hour:
        raise ConfigError("cluster", cluster.name, "has no price", "set price_per_device_hour in its file")
    return dollars / (cluster.price_per_device_hour * cluster.devices)


def buy(config: Config, cluster: Cluster, hours: float, law: FittedLaw = CHINCHILLA) -> Purchase:
    """The compute-optimal model of the config's family, and its tokens, for so many hours of all of the cluster.

    The budget in operations is what the cluster does at the utilisation of a step of that very model, so that the two
    are found together. Raises ConfigError for no hours and for what is no decoder.
    """
    if not hours > 0:
        raise ConfigError("hours", hours, "must be above 0")
    ranks, shaped = cluster.devices, config
    for _ in range(6):
        sizes = parameter_sizes.of_run(shaped)
        time = step_time.estimate(shaped, cluster, ranks, sizes)
        optimum = compute_optimal(time.model_flops / time.seconds * hours * 3600, law)
        shaped = shaped_for(config, optimum.parameters)
    sizes = parameter_sizes.of_run(shaped)
    time = step_time.estimate(shaped, cluster, ranks, sizes)
    return Purchase(optimum, shaped, sizes.total, hours, money.bill(hours, ranks, cluster).cost, time)


def read_law(path: Path) -> FittedLaw:
    """A fitted ladder: JSON with E, A, a, B and b, their `intervals` and the `points`, as `bigtrain report --ladder`
    writes it; without the last two no interval is known. Raises ConfigError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        constants = {name: float(found[name]) for name in ("E", "A", "a", "B", "b")}
        errors, middle = {}, 1.0
        if "intervals" in found and found.get("points"):
            for name in ("E", "a", "b"):
                low, high = map(float, found["intervals"][name])
                errors[f"{name}_error"] = (high - low) / 2 / DEVIATIONS
            works = [math.log(6 * float(each["parameters"]) * float(each["tokens"])) for each in found["points"]]
            middle = math.exp(sum(works) / len(works))
    except OSError as error:
        raise ConfigError("ladder", str(path), f"cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError("ladder", str(path), "holds no fitted E, A, a, B and b") from None
    if not all(map(math.isfinite, [*constants.values(), *errors.values(), middle])):
        raise ConfigError("ladder", str(path), "holds numbers that are not finite", "fit it again, with more runs")
    if min(constants[name] for name in ("A", "a", "B", "b")) <= 0:
        raise ConfigError("ladder", str(path), "A, a, B and b must be above 0")
    return FittedLaw(**constants, middle_flops=middle, **errors)


def tokens_to_loss(target_loss: float, parameters: float, law: Law) -> float:
    """Tokens until a model of that size reaches the loss (nats per token): D = (B / (L - E - A / N^a))^(1 / b).

    Raises ConfigError for a loss that it never reaches.
    """
    left = target_loss - law.E - law.A / parameters**law.a
    if left <= 0:
        floor = law.E + law.A / parameters**law.a
        smallest = (law.A / (target_loss - law.E)) ** (1 / law.a) if target_loss > law.E else math.inf
        way_out = f"take more than {smallest:.3g} parameters" if math.isfinite(smallest) else "no model reaches it"
        raise ConfigError("target_loss", target_loss, f"this size ends at {floor:.3f} whatever the data", way_out)
    return (law.B / left) ** (1 / law.b)


def tokens_interval(target_loss: float, parameters: float, law: FittedLaw) -> tuple[float, float]:
    """Of `tokens_to_loss`: E, a and b each off by a standard error, and what that does to log D put together in
    quadrature. At the middle of the fitted runs the loss is held, as the fit held it (E and the two powers trade off
    against each other there). The upper end is infinite where the loss might never be reached.
    """
    middle_parameters, middle_tokens = law.best_split(law.middle_flops)
    above = law.loss(middle_parameters, middle_tokens) - law.E

    def moved(name: str, error: float) -> Law:
        if name == "a":
            return replace(law, a=law.a + error, A=law.A * middle_parameters**error)
        if name == "b":
            return replace(law, b=law.b + error, B=law.B * middle_tokens**error)
        kept = 1 - error / above
        return replace(law, E=law.E + error, A=law.A * kept, B=law.B * kept)

    tokens = tokens_to_loss(target_loss, parameters, law)
    fewer = more = 0.0
    for name in ("E", "a", "b"):
        changes = [0.0]
        for sign in (-1, 1):
            other = moved(name, sign * getattr(law, f"{name}_error"))
            try:
                learns = min(other.A, other.a, other.B, other.b) > 0
                reached = max(1.0, tokens_to_loss(target_loss, parameters, other)) if learns else math.inf
            except (ConfigError, OverflowError):
                reached = math.inf
            changes.append(math.log(reached / tokens))
        fewer, more = math.hypot(fewer, min(changes)), math.hypot(more, max(changes))
    return tokens * math.exp(-fewer), tokens * math.exp(more) if more < MOST_LOG else math.inf
