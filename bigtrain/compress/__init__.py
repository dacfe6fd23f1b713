"""Transforms: what changes the model while it trains, in any combination (`compress=[prune_global,...]`).

Importing this needs no torch; `build` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigtrain.config import Config

if TYPE_CHECKING:
    from bigtrain.compress.base import Transform


def build(config: Config) -> list[Transform]:
    """The transforms of a run, in the order in which they apply. The config is checked before (`checks.check`)."""
    found: list[Transform] = []
    if config.compress.prune is not None:
        from bigtrain.compress.prune import Prune

        found.append(Prune(config.compress.prune))
    if config.compress.distil is not None:
        from bigtrain.compress.distil import Distil

        found.append(Distil(config))
    return found
