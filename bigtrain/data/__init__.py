"""Corpus -> token shards -> batches. Nothing here imports torch; `bigtrain.data.loader` does."""

from bigtrain.data.prepare import prepare, prepared_at
from bigtrain.data.prepare_examples import examples_at, prepare_examples
from bigtrain.data.shards import Prepared, TokenShards, load_prepared

__all__ = ["Prepared", "TokenShards", "examples_at", "load_prepared", "prepare", "prepare_examples", "prepared_at"]
