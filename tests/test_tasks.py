"""The tasks that the package brings, as BenchMARL and Hydra know them."""

import pytest
import yaml
from benchmarl.environments import task_config_registry
from benchmarl.hydra_config import load_task_config_from_hydra
from hydra import compose, initialize_config_module

from benchmarl_trust.environments import TASKS
from benchmarl_trust.paths import conf_folder

NAMES = {f"{task.env_name()}/{task.name.lower()}": task for suite in TASKS for task in suite}


@pytest.mark.parametrize(("name", "task"), NAMES.items(), ids=NAMES)
def test_yaml_registry_and_hydra_agree(name, task):
    text = yaml.safe_load((conf_folder() / "task" / f"{name}.yaml").read_text())
    assert text.pop("defaults") == [f"{name.replace('/', '_')}_config", "_self_"]
    assert task_config_registry[name] is task
    assert task.get_from_yaml().config == text == task.get_task().config
    with initialize_config_module("benchmarl.conf", version_base=None):
        cfg = compose("config", overrides=["algorithm=mappo", f"task={name}"])
    assert load_task_config_from_hydra(cfg.task, name) == task.get_from_yaml()


def test_yaml_files_and_tasks_are_the_same():
    folder = conf_folder() / "task"
    files = {file.relative_to(folder).with_suffix("").as_posix() for file in folder.glob("*/*.yaml")}
    assert files == NAMES.keys()
