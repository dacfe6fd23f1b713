"""What is to be done to a trained model, as it is typed: `magnitude=0.5`, `heads=0.25+neurons=0.5+int8`.

Every number says how much is removed: heads=0.25 removes a quarter of each layer's heads, layers=2 two layers, and
magnitude=0.5 sets half of the weights to zero.
"""

from __future__ import annotations

from dataclasses import dataclass

from bigtrain.compress_config import PruneConfig, RampConfig, n_of_m
from bigtrain.errors import ConfigError, nearest
from bigtrain.post_training.structure import PARTS, Cut

METHODS = ("magnitude", "wanda")
QUANTIZED = ("int8", "int4", "int8_dynamic")
EXAMPLES = "heads=0.25, neurons=0.5, layers=2, dim=64, magnitude=0.5, wanda=0.5, nm=2:4, int8, int4, int8_dynamic"


@dataclass(frozen=True)
class Recipe:
    """In this order, with training after the first two if that is asked for: cut, prune, quantize."""

    name: str  # as typed
    cut: Cut
    prune: PruneConfig | None = None
    quantize: str | None = None  # one of QUANTIZED

    @property
    def dense(self) -> str:
        """The folder of what there is before it is quantized; "": of nothing but the model itself."""
        steps = [step for step in self.name.split("+") if step not in QUANTIZED]
        return "+".join(steps).replace(":", "-").replace("=", "-")

    @property
    def folder(self) -> str:
        return "+".join(filter(None, (self.dense, self.quantize)))


def parse(text: str) -> Recipe:
    """Raises ConfigError for what is no step, a value that cannot be, or two steps of one kind."""
    cut, prune, quantize = Cut(), None, None
    seen: set[str] = set()
    for step in text.split("+"):
        name, equals, value = step.partition("=")
        kind = "prune" if name in (*METHODS, "nm") else "quantize" if name in QUANTIZED else name
        if kind in seen:
            raise ConfigError("RECIPE", text, f"has {kind} twice")
        seen.add(kind)
        if name in QUANTIZED and not equals:
            quantize = name
        elif name in PARTS and equals:
            cut = Cut(**{**vars(cut), name: _number(text, name, value)})
        elif name in METHODS and equals:
            prune = PruneConfig(method=name, sparsity=_sparsity(text, name, value), scope=_SCOPES[name])  # type: ignore[arg-type]
        elif name == "nm" and equals:
            try:
                n_of_m(value)
            except ValueError:
                raise ConfigError("RECIPE", text, f"nm={value} is no pattern", "write it as nm=2:4") from None
            prune = PruneConfig(pattern=value, scope="layer")
        else:
            near = nearest(name, (*METHODS, *QUANTIZED, *PARTS, "nm"))
            hint = (
                f"did you mean {near}?"
                if near and near != name
                else f"steps are {EXAMPLES} (a number says how much is removed), joined by +"
            )
            raise ConfigError("RECIPE", text, f"{step!r} is no step", hint)
    if prune is not None:
        prune.schedule = RampConfig(kind="constant")
    return Recipe(text, cut, prune, quantize)


_SCOPES = {"magnitude": "global", "wanda": "layer"}


def _number(text: str, name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError("RECIPE", text, f"{name}={value} is no number") from None


def _sparsity(text: str, name: str, value: str) -> float:
    found = _number(text, name, value)
    if not 0 <= found < 1:
        raise ConfigError("RECIPE", text, f"{name}={value}: sparsity must be at least 0 and below 1")
    return found
