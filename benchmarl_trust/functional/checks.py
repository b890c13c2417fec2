"""What settings and shapes must be, said in one way."""

from collections.abc import Iterable

import torch
from torch import Tensor

LARGEST_FLOAT = torch.finfo(torch.float64).max


def check_choice(key: str, value: object, choices: Iterable[str], usual: object = None, null: bool = False) -> None:
    """Refuse an unknown choice; None is one if ``null``.

    Raises:
        ValueError: naming the key, the choices and, if it is given, the usual one.

    Examples:
        >>> check_choice("advantage", "joint", ("per_agent", "team"))
        Traceback (most recent call last):
        ValueError: advantage=joint is unknown: choose one of per_agent, team.
    """
    if not ((isinstance(value, str) and value in tuple(choices)) or (null and value is None)):
        names = ", ".join(choices) + (" or null" if null else "")
        known = "" if usual is None else f" The usual value is {usual}."
        raise ValueError(f"{key}={value} is unknown: choose one of {names}.{known}")


def check_number(
    key: str,
    value: object,
    usual: object,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    whole: bool = False,
    null: bool = False,
) -> None:
    """Refuse what is no number in the given interval; None is one if ``null``.

    Raises:
        ValueError: naming the key, the interval and the usual value.

    Examples:
        >>> check_number("cg_iters", 10, usual=10, least=1, whole=True)
        >>> check_number("kl_threshold", float("nan"), usual=0.01, above=0)
        Traceback (most recent call last):
        ValueError: kl_threshold=nan must be a number above 0. The usual value is 0.01.
    """
    if null and value is None:
        return
    good = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (isinstance(value, int) or not whole)
        and abs(value) <= LARGEST_FLOAT
        and (above is None or value > above)
        and (below is None or value < below)
        and (least is None or value >= least)
        and (most is None or value <= most)
    )
    if not good:
        parts = ((above, "above"), (least, "at least"), (below, "below"), (most, "at most"))
        wanted = " and ".join(f"{word} {bound:g}" for bound, word in parts if bound is not None)
        name = " ".join(["whole number" if whole else "finite number" if not wanted else "number", wanted]).strip()
        shown = repr(value) if isinstance(value, str) else value  # '3' is no 3
        or_null = ", or null" if null else ""
        raise ValueError(f"{key}={shown} must be a {name}{or_null}. The usual value is {usual}.")


def check_same_shape(**tensors: Tensor) -> None:
    """Raise if the named tensors differ in shape.

    Raises:
        ValueError: with every name and shape.

    Examples:
        >>> import torch
        >>> check_same_shape(a=torch.zeros(3), b=torch.ones(3))
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"Shapes differ: {shapes}. Broadcasting them would mix samples of different agents; give all of them "
            "the same shape (the usual slip is a missing or an extra trailing dimension of 1)."
        )
