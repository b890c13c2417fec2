"""One entry per algorithm: it drives every generic test."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from benchmarl_trust import ALGORITHMS


class Case(NamedTuple):
    """An algorithm and the settings that its generic tests run it with."""

    name: str
    overrides: Mapping = MappingProxyType({})

    @property
    def id(self) -> str:
        return "-".join([self.name, *map(str, self.overrides.values())])

    def config(self, **overrides):
        config = ALGORITHMS[self.name].get_from_yaml()
        for key, value in {**self.overrides, **overrides}.items():
            assert hasattr(config, key), key
            setattr(config, key, value)
        return config


CASES = [
    Case("mars"),
    Case("mars", {"penalty": "log"}),
    Case("maspo"),
]
