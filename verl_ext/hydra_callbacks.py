"""What happens around each Hydra job of verl's trainers (:mod:`verl_ext.hydra_config` adds it to verl's configs).

It reads the top-level node ``verl_ext`` that our YAML files write, and does nothing to a stock run but shut Ray down at
its end:

- ``verl_ext.validator``: name of a function ``(config) -> None`` that raises ValueError to refuse the settings;
- ``verl_ext.prepare``: name of a function ``(config) -> None`` that builds what the run needs before Ray starts.
"""

import sys
import traceback
from collections.abc import Callable
from typing import Any

from hydra.experimental.callback import Callback
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from verl_ext import cpu


class JobCallback(Callback):
    """Validate and prepare before a job; leave a clean process behind after it."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Run verl's job only if the settings hold.

        Raises:
            SystemExit: with a message that the interpreter prints. Hydra turns an Exception of a callback into a
                warning and goes on, so nothing less would stop the run.
        """
        if OmegaConf.select(config, "trainer.device") == "cpu":
            cpu.request()
        settings = config.get("verl_ext")
        if not settings:
            return
        # What the job itself will see: Hydra's own node has values that are not known yet.
        job_config = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
        _call("the trainer", refuse_unsupported_trainer, job_config)
        for step in ("validator", "prepare"):
            if name := settings.get(step):
                _call(f"verl_ext.{step}={name}", lambda c, name=name: get_method(name)(c), job_config)

    def on_job_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Shut Ray down: verl starts it once a process, and a multirun runs all its jobs in one process."""
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            ray.shutdown()


def refuse_unsupported_trainer(config: DictConfig) -> None:
    """Refuse verl's trainers that would ignore the extensions which the node ``verl_ext`` asks for.

    Raises:
        ValueError: names the setting, what was found and what would be right.
    """
    wanted = [key for key in ("actor_worker_class", "whole_groups") if config.verl_ext.get(key)]
    if not wanted:
        return
    if not config.trainer.use_v1:
        raise ValueError(
            f"trainer.use_v1=False is verl's legacy trainer, which knows nothing of verl_ext.{wanted[0]}; "
            "set trainer.use_v1=True"
        )
    # The node that tells the configs of verl.experimental's trainers from those of main_ppo.
    if "rollout" in config:
        raise ValueError(
            f"verl.experimental's trainers know nothing of verl_ext.{wanted[0]}; run python -m verl.trainer.main_ppo"
        )


def _call(what: str, function: Callable[[DictConfig], None], config: DictConfig) -> None:
    """``function(config)``; a ValueError is a refusal and ends the process with its message alone."""
    try:
        function(config)
    except ValueError as e:
        raise SystemExit(f"verl-disco: settings refused: {e}") from e
    except Exception as e:
        traceback.print_exc()
        raise SystemExit(f"verl-disco: {what} failed: {type(e).__name__}: {e}") from e
