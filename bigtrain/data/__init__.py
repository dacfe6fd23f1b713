"""Corpus -> token shards -> batches. Nothing here imports torch; `bigtrain.data.loader` does."""

from bigtrain.data.prepare import prepare
from bigtrain.data.prepare_examples import prepare_examples
from bigtrain.data.shards import Prepared, TokenShards, load_prepared

__all__ = ["Prepared", "TokenShards", "load_prepared", "prepare", "prepare_examples"]
