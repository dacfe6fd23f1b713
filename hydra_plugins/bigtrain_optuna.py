"""`hydra/sweeper=optuna` for bigtrain: Hydra looks for sweepers in packages of this name, and nowhere else.

hydra-optuna-sweeper, which has the same name, is not used: it wants Optuna 2, cannot prune, and does not know a trial
that failed or was left unfinished from one that is done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class OptunaSweeper(Sweeper):
    """Options are those of conf/hydra/sweeper/optuna.yaml."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from bigtrain.config import objective_names
        from bigtrain.sweep import slots, study

        sweep = Path(str(self.config.hydra.sweep.dir))
        sweep.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, sweep / "multirun.yaml")
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        params = [f"{key}={value}" for key, value in (self.options.get("params") or {}).items()]
        space: dict[str, study.Dimension] = {}
        fixed: list[str] = []
        for override in parser.parse_overrides(params + list(arguments)):
            name = override.get_key_element().lstrip("+")
            if override.is_sweep_override():
                space[name] = _dimension(override)
            else:
                space.pop(name, None)  # params may name what the command line gives one value
                fixed.append(f"{override.get_key_element()}={override.get_value_element_as_str()}")
        at_once = slots.count(OmegaConf.to_container(self.config.hydra.launcher, resolve=True))  # type: ignore[arg-type]
        study.optimise(
            sweep, space, fixed, len(objective_names(self._objective(fixed))), self.options,
            int(self.options.get("n_jobs") or at_once), self._launch,
        )  # fmt: skip

    def _launch(self, batch: list[list[str]], first: int) -> None:
        self.validate_batch_is_legal(batch)
        self.launcher.launch(batch, initial_job_idx=first)

    def _objective(self, fixed: list[str]) -> Any:
        """train.objective as the trials will have it."""
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, fixed)
        found = OmegaConf.select(composed, "train.objective")
        return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found


def _dimension(override: Override) -> Any:
    from bigtrain.errors import ConfigError
    from bigtrain.sweep.study import Dimension

    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        if "log" in value.tags and value.start <= 0:
            name = (override.key_or_group or "").lstrip("+")
            raise ConfigError(name, str(override.input_line), "a logarithmic interval must begin above 0")
        return Dimension(key, low=value.start, high=value.end, log="log" in value.tags, whole=whole)
    if isinstance(value, RangeSweep) and not value.shuffle and value.start is not None and value.stop is not None:
        whole = all(isinstance(number, int) for number in (value.start, value.stop, value.step))
        steps = max(0, -(-(value.stop - value.start) // value.step) - 1)  # a range ends before its stop
        return Dimension(key, low=value.start, high=value.start + steps * value.step, step=value.step, whole=whole)
    assert isinstance(value, (ChoiceSweep, RangeSweep))
    return Dimension(key, choices=tuple(str(text) for text in override.sweep_string_iterator()))
