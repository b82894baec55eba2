"""Hyperparameters that may change over the gradient steps.

A hyperparameter is a number, or a callable of the gradient step (counted from the start of warm-up) that
returns one. NumPyro kernels call it with a traced integer, so it must be written with ``jax.numpy`` there
(every optax schedule is); Pyro kernels call it with a Python integer.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

Schedule = Callable[[Any], Any]


def value_at(schedule: float | Schedule, step: Any) -> Any:
    """Value of a number or callable at a gradient step."""
    return schedule(step) if callable(schedule) else schedule


def check_values(name: str, schedule: float | Schedule, steps: Iterable[int], *, positive: bool) -> None:
    """Check a hyperparameter on some gradient steps.

    Parameters
    ----------
    name
        The argument's name, for the message.
    schedule
        A number, or a callable of the step.
    steps
        Where a callable is tried.
    positive
        Whether a number must be above 0 rather than at least 0. A callable may touch 0, as a cosine does.

    Raises
    ------
    ValueError
        Where a value is not finite or too small; the message names the argument, the value and the step.
    """
    if not callable(schedule):
        try:
            if isinstance(schedule, str | bool):
                raise TypeError
            value = float(schedule)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be a number or a callable of the step, got {schedule!r}") from None
        if not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
            bound = "greater than 0" if positive else "at least 0"
            raise ValueError(f"{name} must be finite and {bound}, got {schedule!r}")
        return
    for step in steps:
        value = float(schedule(step))
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"{name} must return finite values that are at least 0, got {value!r} at gradient step {step}: "
                "change the schedule, or bound it there"
            )


def trial_steps(total: int) -> list[int]:
    """Up to about 70 steps of a run of `total` steps, the first few and evenly spread ones, to try a callable on."""
    stride = max(total // 64, 1)
    return sorted({*range(min(8, total + 1)), *range(0, total + 1, stride), total})
