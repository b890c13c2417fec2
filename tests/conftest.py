import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from benchmarl.experiment import Experiment, ExperimentConfig
from benchmarl.models import MlpConfig

PARALLEL = "PYTEST_XDIST_WORKER" in os.environ  # then one thread for each worker, and for its child processes
if PARALLEL:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# SMAX takes 10 seconds to compile, in each of the processes that the tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))

try:  # TensorBoard and JAX bring it
    from absl.logging import get_absl_handler
except ImportError:
    pass
else:  # or else it keeps pytest's stderr, and closes it when a test lets Hydra configure logging anew
    get_absl_handler().python_handler.stream = sys.__stderr__


def pytest_addoption(parser):
    parser.addoption("--simcuda", action="store_true", help="run gpu tests on a simulated device where there is none")


def pytest_configure(config):
    """With --simcuda; see tests/simcuda. A torch that it does not know skips the gpu tests, the pinned one fails."""
    config.no_gpu, config.simulated = "no CUDA device; --simcuda simulates one", False
    if config.getoption("--simcuda") and not torch.cuda.is_available():
        from simcuda import install

        try:
            install.install()
            config.simulated = True
        except install.UnknownTorchError as error:
            if install.is_known():
                raise
            config.no_gpu = str(error)


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=config.no_gpu))


@pytest.fixture
def recorder(request):
    """What counts waits and launches of the simulated device, from zero; without that device the test is skipped."""
    if not request.config.simulated:
        pytest.skip("counts on the simulated device: --simcuda, where there is no other")
    from simcuda.record import RECORDER

    RECORDER.reset()
    yield RECORDER
    RECORDER.reset()


@pytest.fixture(autouse=True)
def _two_threads():
    torch.set_num_threads(1 if PARALLEL else min(2, torch.get_num_threads()))


@pytest.fixture
def experiment_config(tmp_path) -> ExperimentConfig:
    """Two iterations of 40 frames, no evaluation; everything is written to a temporary folder."""
    config = ExperimentConfig.get_from_yaml()
    config.save_folder = str(tmp_path)
    config.max_n_iters, config.max_n_frames = 2, None
    config.on_policy_collected_frames_per_batch = config.off_policy_collected_frames_per_batch = 40
    config.on_policy_n_envs_per_worker = config.off_policy_n_envs_per_worker = 4
    config.on_policy_n_minibatch_iters, config.on_policy_minibatch_size = 2, 20
    config.evaluation, config.evaluation_interval, config.evaluation_episodes = False, 40, 2
    config.share_policy_params = False
    config.render = False
    config.loggers = ["csv"]
    config.lr = 1e-3
    return config


@pytest.fixture
def mlp_config() -> MlpConfig:
    return MlpConfig(num_cells=[8], activation_class=torch.nn.Tanh, layer_class=torch.nn.Linear)


@pytest.fixture
def make_experiment(experiment_config, mlp_config):
    """A function that builds an Experiment, by default MLP on VMAS simple_spread of 5 steps, three agents.

    Its steps take a third of the time of balance's.
    """
    from benchmarl.environments import VmasTask

    def make(algorithm, task=None, model=None, critic=None, seed=0, callbacks=None, **settings) -> Experiment:
        for key, value in settings.items():
            assert hasattr(experiment_config, key), key
            setattr(experiment_config, key, value)
        if task is None:
            task = VmasTask.SIMPLE_SPREAD.get_from_yaml()
            task.config.update(max_steps=5, n_agents=3)
        return Experiment(
            task=task,
            algorithm_config=algorithm,
            model_config=model or mlp_config,
            critic_model_config=critic,
            seed=seed,
            config=experiment_config,
            callbacks=callbacks,
        )

    return make


@pytest.fixture
def run(make_experiment):
    """A function that runs an Experiment as users do and returns it."""

    def run(*args, **kwargs) -> Experiment:
        experiment = make_experiment(*args, **kwargs)
        experiment.run()
        return experiment

    return run


@contextmanager
def waits_are_errors():
    """An operation at which the host waits for the GPU raises.

    Torch warns that this is a prototype, once the mode is set: as an error the warning would leave it set for good.
    """

    def set_mode(mode):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode(mode)

    set_mode("error")
    try:
        yield
    finally:
        set_mode("default")


def policy_parameters(experiment) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in experiment.policy.named_parameters()}


def scalars(experiment) -> dict[str, list[float]]:
    """What the csv logger wrote: name -> values by iteration."""
    folder = experiment.folder_name / experiment.name / "scalars"
    return {
        file.stem: [float(line.split(",")[1]) for line in file.read_text().splitlines()]
        for file in folder.glob("*.csv")
    }
