"""Training with float8 matmuls, as torchao has them: scales found anew at each step, weights kept as they were.

Micikevicius et al., arXiv 2209.05433. A GPU's matter: `hardware.check_precision` refuses what has no float8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bigtrain.compress.layers import choose
from bigtrain.compress.quantize import torchao
from bigtrain.compress_config import Float8Config
from bigtrain.transform import Transform

FIELD = "compress.float8"
MULTIPLE = 16  # of both sizes of a matrix: what the kernels want


class Float8(Transform):
    """compress.float8."""

    name = "float8"

    def __init__(self, config: Float8Config) -> None:
        self.config = config
        self.emulate = not torch.cuda.is_available()  # the same numbers without the speed: for tests

    def apply(self, model: nn.Module) -> None:
        """Raises ConfigError for a pattern that matches no layer. Layers of sizes that do not fit stay as they are."""
        torchao()
        from torchao.float8 import Float8LinearConfig
        from torchao.float8.float8_linear import Float8Linear

        settings: Any = Float8LinearConfig.from_recipe_name(self.config.recipe)
        object.__setattr__(settings, "emulate", self.emulate)
        for layer in choose(model, self.config.include, self.config.exclude, FIELD):
            if layer.transposed or any(size % MULTIPLE for size in layer.shape):
                continue
            parent, _, last = layer.module.rpartition(".")
            new = Float8Linear.from_float(model.get_submodule(layer.module), settings)
            setattr(model.get_submodule(parent), last, new)
