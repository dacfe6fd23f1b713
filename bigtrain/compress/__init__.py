"""Transforms: what changes the model while it trains, in any combination (`compress=[prune_global,...]`).

Importing this needs no torch; `build` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigtrain.config import Config

if TYPE_CHECKING:
    from bigtrain.transform import Transform


def build(config: Config) -> list[Transform]:
    """The transforms of a run, in the order in which they apply. The config is checked before (`checks.check`)."""
    found: list[Transform] = []
    if config.compress.prune is not None:
        from bigtrain.compress.prune import Prune

        found.append(Prune(config.compress.prune))
    if config.compress.distil is not None:
        from bigtrain.compress.distil import Distil

        found.append(Distil(config))
    if config.compress.quantize is not None:
        from bigtrain.compress.quantize import Quantize

        found.append(Quantize(config.compress.quantize))
    if config.compress.float8 is not None:
        from bigtrain.compress.float8 import Float8

        found.append(Float8(config.compress.float8))
    return found
