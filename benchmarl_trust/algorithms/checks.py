"""Settings that have no meaning are refused before anything is collected: key, value, reason, cure."""

from collections.abc import Iterable
from typing import NoReturn


def check_number(key: str, value, usual, above=None, least=None, below=None, most=None, whole: bool = False) -> None:
    """Refuse what is no number in the given interval.

    Raises:
        ValueError: naming the key, the interval and the usual value.

    Examples:
        >>> check_number("cg_iters", 10, usual=10, least=1, whole=True)
        >>> check_number("kl_threshold", float("nan"), usual=0.01, above=0)
        Traceback (most recent call last):
        ValueError: algorithm.kl_threshold=nan must be a number above 0. The usual value is 0.01.
    """
    kind = int if whole else int | float
    good = isinstance(value, kind) and not isinstance(value, bool) and abs(value) < float("inf")
    good = good and (above is None or value > above) and (below is None or value < below)
    good = good and (least is None or value >= least) and (most is None or value <= most)
    if not good:
        parts = ((above, "above"), (least, "at least"), (below, "below"), (most, "at most"))
        wanted = " and ".join(f"{word} {bound:g}" for bound, word in parts if bound is not None)
        name = "whole number" if whole else "number"
        raise ValueError(f"algorithm.{key}={value} must be a {name} {wanted}. The usual value is {usual}.")


def check_choice(key: str, value, choices: Iterable[str]) -> None:
    """Refuse an unknown choice.

    Raises:
        ValueError: naming the key and the choices.

    Examples:
        >>> check_choice("advantage", "joint", ("per_agent", "team"))
        Traceback (most recent call last):
        ValueError: algorithm.advantage=joint is unknown: choose one of per_agent, team.
    """
    if value not in tuple(choices):
        raise ValueError(f"algorithm.{key}={value} is unknown: choose one of {', '.join(choices)}.")


def refuse(key: str, value, reason_and_cure: str) -> NoReturn:
    """Refuse a setting that has no meaning beside the others.

    Raises:
        ValueError: always, naming the key.
    """
    raise ValueError(f"algorithm.{key}={value}: {reason_and_cure}")
