"""Where Hydra looks for launchers: it instantiates plugins of a package of this name only."""

from verl_ext.hydra import sweep


class SweepLauncher(sweep.SweepLauncher):
    """See :mod:`verl_ext.hydra.sweep`."""
