"""Lets stock BenchMARL find the algorithms of benchmarl_trust."""

import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


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
