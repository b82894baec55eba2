"""What a parameter of a network is, told by its name and shape: shared by the priors of both backends.

The hosts' lifting functions hand a prior nothing else. The name's last part (after the last dot) decides:

* a *bias* has `bias` in it;
* a *normalisation scale* has one axis at most and is called `weight` (torch, equinox) or `scale` (flax);
* a *weight* is everything else with two axes or more, embeddings and normalisations over several axes included;
* what is left is a vector or scalar of the user's own.
"""

import math
import numbers
from typing import Any


def is_weight(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a weight: two axes or more, and not called a bias."""
    return len(shape) > 1 and "bias" not in _last(name)


def center(name: str, shape: tuple[int, ...]) -> float:
    """Where a prior is centred: 1 for a normalisation scale, which multiplies its layer's output, 0 for the rest."""
    return 1.0 if len(shape) < 2 and _last(name) in ("weight", "scale") else 0.0


def fan_in_of(shape: tuple[int, ...], *, outputs_first: bool) -> int:
    """Number of inputs that a unit adds up: all axes of a weight but that of the outputs.

    Parameters
    ----------
    shape
        Shape of a weight.
    outputs_first
        Whether the outputs are the first axis, (out, in, ...), as in torch and equinox, or the last, (..., in, out),
        as in flax.

    Returns
    -------
    int
        At least 1.
    """
    return max(math.prod(shape[1:] if outputs_first else shape[:-1]), 1)


def output_axis(name: str) -> int:
    """Axis of a weight's outputs: the first of one whose name's last part begins with `weight`, else the last."""
    return 0 if _last(name).startswith("weight") else -1


def check_scale(name: str, value: Any) -> None:
    """Raise a ValueError unless an argument is a positive number, or an array, whose values a model may sample."""
    if hasattr(value, "shape") and not isinstance(value, numbers.Real):
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number greater than 0, or an array of such, got {value!r}")


def check_fan_in(fan_in: Any) -> None:
    """Raise a ValueError unless `fan_in` is a bool: it is a choice, and the number is taken from the shapes."""
    if not isinstance(fan_in, bool):
        raise ValueError(f"fan_in must be True or False, got {fan_in!r}: the number of inputs is taken from the shapes")


def _last(name: str) -> str:
    return name.rpartition(".")[2]
