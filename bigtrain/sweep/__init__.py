"""Many runs from one command: each trial a launch, a port and a run directory of its own.

Hydra (or its Optuna sweeper, hydra_plugins/bigtrain_optuna.py) says which trials; here is what runs one (run.py), what
is kept of it (trials.py), which cores and GPUs it gets where several run at once (slots.py), what ends a bad one early
(prune.py), and what is shown of them all (results.py).
"""
