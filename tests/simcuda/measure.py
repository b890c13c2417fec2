"""Waits and launches of one training iteration of an experiment, whose collection and setup are left out."""

from collections.abc import Iterator

from benchmarl.experiment import Experiment

#: The second iteration: in the first, optimizers and others make what lasts.
MEASURED = 1


def measure(experiment: Experiment, recorder) -> None:
    """Run the experiment; the recorder has what its second iteration did."""
    collector = experiment.collector
    iterator = type(collector).iterator

    def paused(method):
        def call(*args, **kwargs):
            with recorder.recording(False):
                return method(*args, **kwargs)

        return call

    def batches(self) -> Iterator:
        for k, batch in enumerate(iterator(self)):
            with recorder.recording(k == MEASURED):
                yield batch

    collector.update_policy_weights_ = paused(collector.update_policy_weights_)
    type(collector).iterator, before = batches, iterator
    try:
        experiment.run()
    finally:
        type(collector).iterator = before
