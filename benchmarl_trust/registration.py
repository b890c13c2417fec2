"""Makes the algorithms and tasks known to BenchMARL and to Hydra."""

import sys
from types import ModuleType

from benchmarl.algorithms import algorithm_config_registry
from benchmarl.environments import task_config_registry
from hydra.core.config_store import ConfigStore

from benchmarl_trust.algorithms import ALGORITHMS
from benchmarl_trust.environments import TASKS, PackagedTask
from benchmarl_trust.runtime import look_before_setup


def register() -> None:
    """Add algorithms and tasks to BenchMARL's registries and their schemas to Hydra's ConfigStore; twice is safe.

    BenchMARL copies its own registries into the ConfigStore once, when it is imported, so both are needed.

    Examples:
        >>> register()
        >>> algorithm_config_registry["mars"].__name__
        'MarsConfig'
        >>> task_config_registry["trust_games/climbing"].name
        'CLIMBING'
    """
    look_before_setup()
    algorithm_config_registry.update(ALGORITHMS)
    for name, config in ALGORITHMS.items():
        ConfigStore.instance().store(group="algorithm", name=f"{name}_config", node=config)
    for suite in TASKS:
        for task in suite:
            _register_task(task)


def _register_task(task: PackagedTask) -> None:
    environment, name = task.env_name(), task.name.lower()
    task_config_registry[f"{environment}/{name}"] = task
    ConfigStore.instance().store(group="task", name=f"{environment}_{name}_config", node=task.schema())
    # BenchMARL looks for a task's schema in a module of its own package; without one it warns and checks nothing.
    module = ModuleType(f"benchmarl.environments.{environment}.{name}")
    vars(module)["TaskConfig"] = task.schema()
    sys.modules[module.__name__] = module
