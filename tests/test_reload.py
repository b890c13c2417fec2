"""Checkpoints of ours load where BenchMARL's do: in a script, and by its own two commands (test_plugin.py)."""

import pytest
import torch
from benchmarl.experiment import Experiment
from cases import CASES, by_family

family_cases = pytest.mark.parametrize("case", by_family(CASES))


@family_cases
def test_reload_and_go_on(case, run):
    experiment = run(case.config(), checkpoint_at_end=True)
    file = experiment.folder_name / "checkpoints" / "checkpoint_80.pt"
    again = Experiment.reload_from_file(str(file), experiment_patch={"max_n_iters": 4})
    for name, loss in experiment.losses.items():
        for old, new in zip(loss.parameters(), again.losses[name].parameters(), strict=True):
            assert torch.equal(old, new)
    assert again.n_iters_performed == 2
    again.run()
    assert again.n_iters_performed == 4
    again.evaluate()
