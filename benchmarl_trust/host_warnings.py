"""Warnings of TorchRL that every run prints and no user can do anything about."""

import sys
import warnings

#: (message, category): regular expressions of what TorchRL's own modules say.
HARMLESS = (
    # BenchMARL 1.5.2 makes its collectors by this name, and the TorchRL that it pins has it.
    (r"SyncDataCollector has been deprecated", DeprecationWarning),
    # Families of which BenchMARL has no task. Its own, MPE and SISL, have warnings of their own.
    (r"PettingZoo failed to load all modules .* trying to load individual modules", UserWarning),
    (r"(Atari|Classic|Butterfly) environments failed to load", UserWarning),
)


def ignore_harmless() -> None:
    """Keep them out of the output, unless the user said what to do with warnings (``-W``, ``PYTHONWARNINGS``)."""
    if sys.warnoptions:
        return
    for message, category in HARMLESS:
        warnings.filterwarnings("ignore", message, category, module=r"torchrl\.")
