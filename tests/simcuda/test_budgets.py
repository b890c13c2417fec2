"""How often the host waits for a GPU in a training iteration, and how many kernels it launches: a budget by algorithm.

A change that adds one fails here. One that saves some lowers the number: the budgets are what is needed today.
"""

import pytest
import torch
from benchmarl.algorithms import MappoConfig
from benchmarl.environments import VmasTask
from benchmarl.models import MlpConfig
from cases import configured

from benchmarl_trust import ALGORITHMS
from simcuda.measure import measure

pytestmark = pytest.mark.gpu

N = 4
TRIALS = N  # the first fraction of every agent's step is taken

#: Of balance with an MLP of two layers, two epochs of four minibatches: waits that a line of the package asks for, and
#: launches of the whole iteration but for collection.
BUDGETS = {
    "mappo": (0, 2417),  # BenchMARL's own, for scale
    "mars": (3, 2513),
    "mars with running values": (4, 2651),  # one wait more, for what is logged
    "maspo": (3, 2505),
    "gpae": (5, 2634),
    "happo": (4, 3994),
    "cliphappo": (4, 3994),
    "a2po": (4, 4459),
    "hatrpo": (4 + TRIALS, 4797),
    "cliphatrpo": (4 + TRIALS, 4797),
    "hatrpow": (4 + TRIALS, 4109),
    "hatrpog": (3 + N + TRIALS, 3844),
}


#: Keys of a budget that is not a preset's own.
KEYS = {"mars with running values": {"normalize_value": "running"}}


@pytest.mark.parametrize("name", BUDGETS)
def test_budget(name, make_experiment, recorder):
    task = VmasTask.BALANCE.get_from_yaml()
    task.config.update(n_agents=N, max_steps=10)
    experiment = make_experiment(
        configured(ALGORITHMS.get(name.split()[0], MappoConfig), **KEYS.get(name, {})),
        task=task,
        model=MlpConfig(num_cells=[8, 8], activation_class=torch.nn.Tanh, layer_class=torch.nn.Linear),
        sampling_device="cuda",
        train_device="cuda",
        buffer_device="cuda",
        on_policy_collected_frames_per_batch=80,
        on_policy_n_envs_per_worker=8,
        on_policy_n_minibatch_iters=2,
        on_policy_minibatch_size=20,
    )
    measure(experiment, recorder)
    waits, launches = BUDGETS[name]
    own = recorder.own_waits
    assert own.total() <= waits, own
    assert recorder.launches.total() <= launches, recorder.launches.most_common()
