"""Settings that have no meaning are refused before anything is collected: key, value, reason, cure."""

from collections.abc import Iterable
from typing import NoReturn

from benchmarl_trust import functional as F


def check_number(key: str, value: object, usual: object, **interval) -> None:
    """:func:`benchmarl_trust.functional.check_number` of an algorithm's key.

    Examples:
        >>> check_number("kl_threshold", float("nan"), usual=0.01, above=0)
        Traceback (most recent call last):
        ValueError: algorithm.kl_threshold=nan must be a number above 0. The usual value is 0.01.
    """
    F.check_number(f"algorithm.{key}", value, usual, **interval)


def check_choice(key: str, value: object, choices: Iterable[str]) -> None:
    """:func:`benchmarl_trust.functional.check_choice` of an algorithm's key.

    Examples:
        >>> check_choice("advantage", "joint", ("per_agent", "team"))
        Traceback (most recent call last):
        ValueError: algorithm.advantage=joint is unknown: choose one of per_agent, team.
    """
    F.check_choice(f"algorithm.{key}", value, choices)


def refuse(key: str, value: object, reason_and_cure: str) -> NoReturn:
    """Refuse a setting that has no meaning beside the others.

    Raises:
        ValueError: always, naming the key.
    """
    raise ValueError(f"algorithm.{key}={value}: {reason_and_cure}")
