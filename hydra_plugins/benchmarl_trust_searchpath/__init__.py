"""Lets stock BenchMARL find the algorithms of benchmarl_trust, and names the extra of a launcher that is missing."""

import importlib.util
import sys
from collections.abc import Sequence

from hydra.core.config_search_path import ConfigSearchPath
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin

#: Hydra's launchers in the extra "sweep", and the plugin of each.
LAUNCHERS = {
    "joblib": "hydra_joblib_launcher",
    "submitit_local": "hydra_submitit_launcher",
    "submitit_slurm": "hydra_submitit_launcher",
}


class BenchmarlTrustSearchPath(SearchPathPlugin):
    """Adds the package's conf folder to Hydra's search path, in programs that run BenchMARL.

    Hydra loads every plugin in every Hydra program of the environment, so this one imports nothing heavy and does
    nothing unless BenchMARL has been imported.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Register the algorithms and append their conf folder."""
        if "benchmarl" not in sys.modules:
            return
        from benchmarl_trust.paths import conf_folder

        search_path.append("benchmarl_trust", f"file://{conf_folder()}")
        register_missing_launchers()


def register_missing_launchers() -> None:
    """Give each launcher that is not installed a configuration, which takes any key, of :class:`MissingLauncher`."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    for name, plugin in LAUNCHERS.items():
        if importlib.util.find_spec(f"hydra_plugins.{plugin}") is None:
            target = {"_target_": f"{__name__}.{MissingLauncher.__name__}", "name": name}
            node = OmegaConf.create(target, flags={"struct": False})
            ConfigStore.instance().store(group="hydra/launcher", name=name, node=node, provider="benchmarl_trust")


class MissingLauncher(Launcher):
    """Stands in for a launcher that is not installed, and says how to install it.

    Args:
        name (str): the launcher's.
        **kwargs: its settings.
    """

    def __init__(self, name: str, **kwargs):
        self.name = name

    def setup(self, **kwargs) -> None:
        """Called before anything is launched.

        Raises:
            CompactHydraException: always; Hydra prints its text alone.
        """
        raise CompactHydraException(
            f'hydra/launcher={self.name} is not installed: pip install "benchmarl_trust[sweep]", or leave it out to '
            "run one after another."
        )

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[object]:
        """Never called."""
        raise NotImplementedError
