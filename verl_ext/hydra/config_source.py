"""Makes ``algorithm=NAME`` a Hydra config group, although verl's primary configs define ``algorithm:`` as a plain node.

Two Hydra plugins, registered when Hydra is first imported, act only if the application's main config directory lies
inside the installed verl package. Then verl's directory is served together with our config groups and the recipes'
(:mod:`verl_ext.recipes`), and to a primary config the defaults ``setting: null`` and ``algorithm: ppo`` are appended,
which set nothing, and the Hydra callback of :mod:`verl_ext.hydra.callbacks`. So stock commands compose as before, and
nothing of verl is copied.

A primary config of your own, outside verl, that inherits from verl's asks for all of it by its search path::

    hydra:
      searchpath: [verl-ext://trainer/config]
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

from verl_ext import recipes


def register() -> None:
    """Add our resolvers, and our Hydra plugins as soon as this process imports Hydra (most Ray workers never do)."""
    from omegaconf import OmegaConf
    from wrapt import register_post_import_hook

    # Ray ships the composed config with its interpolations, so every process needs the resolvers.
    OmegaConf.register_new_resolver("verl_ext.share", share, replace=True)
    OmegaConf.register_new_resolver("verl_ext.sum", lambda *numbers: sum(numbers), replace=True)
    OmegaConf.register_new_resolver("verl_ext.positive", lambda x: x > 0, replace=True)
    OmegaConf.register_new_resolver(
        "verl_ext.last_part", lambda path: path.rstrip("/").rpartition("/")[2], replace=True
    )
    OmegaConf.register_new_resolver("verl_ext.run_name", run_name, replace=True)
    register_post_import_hook(_register_plugins, "hydra")


def run_name(*, _root_: "DictConfig") -> str:
    """``${verl_ext.run_name:}``: algorithm, what the command line sets otherwise, and seed, as in a sweep.

    Only the process that starts the job knows them: it settles the name for the others (:mod:`verl_ext.hydra.paths`).
    """
    from omegaconf import OmegaConf

    from verl_ext.hydra.sweep import job_name

    return job_name(_root_, OmegaConf.select(_root_, "hydra.overrides.task") or [])


def share(fraction: float, total: int) -> int:
    """``${verl_ext.share:0.2,${data.max_response_length}}``: that part of ``total``, at least 1."""
    return max(1, int(fraction * total))


def _verl_root() -> Path:
    import verl

    return Path(verl.__file__).resolve().parent


def _verl_directory(path: str) -> Path | None:
    """The directory that a Hydra search path element names, if it lies inside the verl package, else None."""
    root = _verl_root()
    scheme, _, rest = path.rpartition("://")
    if scheme == "pkg":
        package, *parts = rest.replace("/", ".").strip(".").split(".")
        directory = root.joinpath(*parts) if package == "verl" else None
    else:
        directory = Path(rest).resolve() if scheme in ("", "file") else None
    return directory if directory is not None and directory.is_relative_to(root) else None


def _register_plugins(_hydra: Any) -> None:
    from hydra._internal.core_plugins.file_config_source import FileConfigSource
    from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
    from hydra.core.object_type import ObjectType
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin
    from omegaconf import DictConfig, OmegaConf

    class VerlConfigSource(FileConfigSource):
        """verl's config directory, then our config groups and the recipes'; see above for what is appended."""

        def __init__(self, provider: str, path: str):
            super().__init__(provider, path)
            # Relative paths are within verl: `hydra.searchpath: [verl-ext://trainer/config]`.
            self.path = str(_verl_root() / self.path)
            self.more = [ImportlibResourcesConfigSource(provider, f"pkg://{p}") for p in recipes.config_packages()]

        @staticmethod
        def scheme() -> str:
            return "verl-ext"

        def available(self) -> bool:
            return Path(self.path).is_dir()

        def load_config(self, config_path: str):
            if not super().is_config(config_path):
                return next((s for s in self.more if s.is_config(config_path)), super()).load_config(config_path)
            result = super().load_config(config_path)
            cfg = result.config
            # The configs that define the node `algorithm`; ppo_megatron_trainer and users' own inherit from these.
            if "/" not in config_path and isinstance(cfg, DictConfig) and {"defaults", "algorithm"} <= cfg.keys():
                # A preset comes first: what a method, a task or an experiment sets besides wins.
                cfg.defaults.append({"setting": None})
                cfg.defaults.append({"algorithm": recipes.DEFAULT_ALGORITHM})
                callback = {"_target_": "verl_ext.hydra.callbacks.JobCallback"}
                OmegaConf.update(cfg, "hydra.callbacks.verl_ext", callback, force_add=True)
            return result

        def is_config(self, config_path: str) -> bool:
            return super().is_config(config_path) or any(s.is_config(config_path) for s in self.more)

        def is_group(self, config_path: str) -> bool:
            # verl's directory "model" holds one fragment and no choice. As a group it would swallow `model=PATH`, which
            # our +experiment=evaluate takes for a setting.
            stock = config_path != "model" and super().is_group(config_path)
            return stock or any(s.is_group(config_path) for s in self.more)

        def list(self, config_path: str, results_filter: ObjectType | None):
            found = [n for s in self.more if s.is_group(config_path) for n in s.list(config_path, results_filter)]
            # verl keeps the fragment of the node algorithm.rollout_correction in a directory of the same name: it is
            # no choice for `algorithm=`.
            if super().is_group(config_path) and (config_path, results_filter) != ("algorithm", ObjectType.CONFIG):
                found += super().list(config_path, results_filter)
            return sorted(set(found))

    class VerlSearchPath(SearchPathPlugin):
        def manipulate_search_path(self, search_path) -> None:
            elements = search_path.get_path()
            main = next((e for e in elements if e.provider == "main"), None)
            directory = _verl_directory(main.path) if main and main.path else None
            if directory is not None:
                main.path = f"{VerlConfigSource.scheme()}://{directory}"

    for plugin in (VerlConfigSource, VerlSearchPath):
        Plugins.instance().register(plugin)
