"""Makes the algorithms known to BenchMARL and to Hydra."""

from benchmarl.algorithms import algorithm_config_registry
from hydra.core.config_store import ConfigStore

from benchmarl_trust.algorithms import ALGORITHMS


def register() -> None:
    """Add every algorithm to BenchMARL's registry and its schema to Hydra's ConfigStore. Calling it twice is safe.

    BenchMARL copies its own registry into the ConfigStore once, when it is imported, so both are needed.

    Examples:
        >>> register()
        >>> algorithm_config_registry["mars"].__name__
        'MarsConfig'
    """
    algorithm_config_registry.update(ALGORITHMS)
    for name, config in ALGORITHMS.items():
        ConfigStore.instance().store(group="algorithm", name=f"{name}_config", node=config)
