"""What every model here can do besides its forward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Network(nn.Module):
    """A stack of blocks, whatever surrounds it."""

    activation_checkpointing = False

    def tie_weights(self) -> None:
        """Make one again of the weights that two modules share, and `to_empty` has made two of."""

    def init_weights(self) -> None:
        """Draw every weight again, in the constructor's order.

        Needed after `to_empty` of a model built on the meta device, and nowhere else: elsewhere, `deepspeed.zero.Init`
        included, each layer has drawn its weights when it was built.
        """
        self.tie_weights()
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Keep only each block's input for the backward pass and compute the rest of the block again there."""
        self.activation_checkpointing = enabled

    def run_block(self, block: nn.Module, x: Tensor, *context: Any) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        if self.activation_checkpointing and self.training:
            result: Tensor = checkpoint(block, x, *context, use_reentrant=False)
            return result
        return block(x, *context)
