"""bigtrain: one config from a laptop to a cluster, for training large models under ZeRO."""

__version__ = "0.1.0"
