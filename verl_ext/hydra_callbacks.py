"""What happens around each Hydra job of verl's trainers (:mod:`verl_ext.hydra_config` adds it to verl's configs).

It saves the composed settings as ``config.yaml`` in ``trainer.default_local_dir`` and shuts Ray down at the job's end.
The rest is said by the top-level node ``verl_ext``, which our YAML files write and a stock run has not:

- ``verl_ext.validator``: name of a function ``(config) -> None`` that raises ValueError to refuse the settings;
- ``verl_ext.prepare``: name of a function ``(config) -> None`` that builds what the run needs before Ray starts.
"""

import os
import sys
import traceback
from typing import Any

from hydra.experimental.callback import Callback
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from verl_ext import cpu
from verl_ext.hydra_config import DEFAULT_ALGORITHM

CONFIG_FILE = "config.yaml"
CHECKPOINT_FILE = "latest_checkpointed_iteration.txt"
"""verl's, in ``trainer.default_local_dir`` as soon as there is a checkpoint."""


class JobCallback(Callback):
    """Validate and prepare before a job; leave a clean process behind after it."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Run verl's job only if the settings hold.

        Raises:
            SystemExit: with a message that the interpreter prints. Hydra turns an Exception of a callback into a
                warning and goes on, so nothing less would stop the run.
        """
        try:
            # What the job itself will see: Hydra's own node has values that are not known yet.
            before_job(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
        except ValueError as e:
            raise SystemExit(f"verl-disco: settings refused: {e}") from e
        except Exception as e:
            traceback.print_exc()
            raise SystemExit(f"verl-disco: not started: {type(e).__name__}: {e}") from e

    def on_job_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Shut Ray down: verl starts it once a process, and a multirun runs all its jobs in one process."""
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            ray.shutdown()


def before_job(config: DictConfig) -> None:
    """All that happens between the composed settings and verl's ``main``."""
    if OmegaConf.select(config, "trainer.device") == "cpu":
        cpu.request()
        cpu.check(config)
    settings = config.get("verl_ext")
    if settings:
        refuse_unsupported_trainer(config)
        if name := settings.get("validator"):
            get_method(name)(config)
    folder = OmegaConf.select(config, "trainer.default_local_dir")
    if folder:
        check_resumed(config, folder)
        os.makedirs(folder, exist_ok=True)
        OmegaConf.save(config, os.path.join(folder, CONFIG_FILE), resolve=True)
    if settings and (name := settings.get("prepare")):
        get_method(name)(config)


def check_resumed(config: DictConfig, folder: str) -> None:
    """Say in which settings a run differs from the one that it resumes.

    Raises:
        ValueError: it would go on with another algorithm, in the same folder.
    """
    saved = os.path.join(folder, CONFIG_FILE)
    resumes = OmegaConf.select(config, "trainer.resume_mode") == "auto"
    if not (resumes and os.path.exists(saved) and os.path.exists(os.path.join(folder, CHECKPOINT_FILE))):
        return
    before, now = flatten(OmegaConf.load(saved)), flatten(config)
    algorithms = [values.get("verl_ext.algorithm", DEFAULT_ALGORITHM) for values in (before, now)]
    if algorithms[0] != algorithms[1]:
        raise ValueError(
            f"trainer.default_local_dir={folder} holds a run of algorithm={algorithms[0]}, which algorithm="
            f"{algorithms[1]} would resume; choose another folder, or trainer.resume_mode=disable"
        )
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            print(f"verl-disco: {folder} is resumed with {name}={now.get(name)}, was {before.get(name)}", flush=True)


def flatten(config: DictConfig) -> dict[str, Any]:
    """Settings by their full names."""

    def walk(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {name: value}
        return {n: v for key, part in value.items() for n, v in walk(f"{name}.{key}" if name else key, part).items()}

    return walk("", OmegaConf.to_container(config, resolve=True))


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
