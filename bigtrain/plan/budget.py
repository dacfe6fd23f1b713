"""What a budget buys: the largest model that fits, the best size and token count for so many hours or dollars, and how
many tokens lead to a loss. recommend.py answers the other way round.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from bigtrain.config import Config, DecoderConfig, DeepSpeedConfig, head_dim
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
    head_size = head_dim(model)
    heads = max(1, round(dim / head_size))
    groups = model.n_heads // (model.n_kv_heads or model.n_heads)
    if groups > 1:
        heads = max(groups, heads // groups * groups)
    wide = heads * head_size
    ratio = (model.ffn_dim or 4 * model.dim) / model.dim
    scaled = replace(
        model,
        dim=wide,
        n_heads=heads,
        n_kv_heads=heads // groups if groups > 1 else None,
        n_layers=max(1, round(model.n_layers * wide / model.dim)),
        ffn_dim=None if model.ffn_dim is None else max(64, round(ratio * wide / 64) * 64),
    )
    return replace(config, model=scaled)


def _parameters(config: Config) -> int:
    return parameter_sizes.of_model(flops.our_model(config.model)).total


def shaped_for(config: Config, parameters: float) -> Config:
    """The architecture at the width whose parameter count is nearest."""
    head_dim = flops.our_model(config.model).dim // flops.our_model(config.model).n_heads
    low, high = 1, 2
    while _parameters(shaped_like(config, high * head_dim)) < parameters and high < 4096:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _parameters(shaped_like(config, middle * head_dim)) < parameters:
            low = middle
        else:
            high = middle
    ways = [shaped_like(config, heads * head_dim) for heads in (low, high)]
    return min(ways, key=lambda each: abs(math.log(_parameters(each) / parameters)))


def largest_model(config: Config, cluster: Cluster) -> Candidate:
    """The widest model of the config's family that some way fits into all of the cluster's devices.

    Raises ConfigError if not even the narrowest does.
    """
    head_dim = flops.our_model(config.model).dim // flops.our_model(config.model).n_heads
    ranks = cluster.devices

    def fits(heads: int) -> Candidate | None:
        shaped = shaped_like(config, heads * head_dim)
        sizes = parameter_sizes.of_run(shaped)
        for way in ways_to_run(shaped, cluster, ranks):
            engine = way.engine
            assert isinstance(engine, DeepSpeedConfig)
            saves = engine.stage == 3 and way.train.activation_checkpointing and way.train.micro_batch == 1
            if saves and (needed := room(way, cluster, ranks, sizes)).fits:
                return priced(way, cluster, ranks, needed, 1.0, sizes)
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


# Approach 3 as Epoch AI corrected it (arXiv 2404.10102, section 3). Standard error of both exponents: 0.02.
CHINCHILLA = Law(E=1.8172, A=482.01, a=0.3478, B=2085.43, b=0.3658)
EXPONENT_ERROR = 0.02
FITTED_FLOPS = 1e20  # the middle of the runs that the law was fitted on: 6e18 to 3e21


@dataclass(frozen=True)
class Optimum:
    """How to spend a budget of operations, each with the interval of one standard error."""

    flops: float
    parameters: float
    parameters_interval: tuple[float, float]
    tokens: float
    tokens_interval: tuple[float, float]
    loss: float


def compute_optimal(budget_flops: float, law: Law = CHINCHILLA) -> Optimum:
    """The size and tokens with the least loss for C = 6 N D operations (arXiv 2203.15556, section 3.3 and equation 4).

    The interval takes the law as exact in the middle of the runs that it was fitted on, and lets the exponent of the
    optimal size be off by its standard error from there: the further away, the wider. Raises ConfigError for no budget.
    """
    if not budget_flops > 0:
        raise ConfigError("budget", budget_flops, "must be above 0")
    parameters, tokens = law.best_split(budget_flops)
    error = EXPONENT_ERROR * math.hypot(law.a, law.b) / (law.a + law.b) ** 2
    spread = max(budget_flops / FITTED_FLOPS, FITTED_FLOPS / budget_flops) ** error
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


def buy(config: Config, cluster: Cluster, hours: float, law: Law = CHINCHILLA) -> Purchase:
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


def read_law(path: Path) -> Law:
    """A fitted ladder: JSON with E, A, a, B and b, which `bigtrain report --ladder` writes. Raises ConfigError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        law = Law(**{name: float(found[name]) for name in ("E", "A", "a", "B", "b")})
    except OSError as error:
        raise ConfigError("ladder", str(path), f"cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError("ladder", str(path), "holds no fitted E, A, a, B and b") from None
    if min(law.A, law.a, law.B, law.b) <= 0:
        raise ConfigError("ladder", str(path), "A, a, B and b must be above 0")
    return law


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
