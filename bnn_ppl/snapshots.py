"""When snapshots of an SVI run fall, and what is said of runs, states and learning rates that do not suit them.

They are taken after the steps start, start + c, start + 2 c, ... with the cycle length c.
"""

import numbers
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from bnn_ppl.schedules import check_count, check_values


def check_snapshots(start: Any, cycle_length: Any) -> None:
    """Raise a ValueError unless these say after which steps snapshots fall."""
    if isinstance(start, bool) or not isinstance(start, numbers.Integral) or start < 0:
        raise ValueError(f"start must be an integer of at least 0, the steps before the first snapshot, got {start!r}")
    check_count("cycle_length", cycle_length)


def first_snapshot(start: int, cycle_length: int) -> int:
    """Number of steps after which the first snapshot falls: a start of 0 has taken no step yet."""
    return start or cycle_length


def is_due(step: Any, start: int, cycle_length: int) -> Any:
    """Whether a snapshot falls after this number of steps, a Python number or an array."""
    first = first_snapshot(start, cycle_length)
    return (step >= first) & ((step - first) % cycle_length == 0)


def steps_of(step: int, count: int, start: int, cycle_length: int) -> np.ndarray:
    """Numbers of steps after which the last `count` snapshots fell, shape (count,), after `step` of them."""
    last = step - (step - first_snapshot(start, cycle_length)) % cycle_length
    return last - cycle_length * np.arange(count)[::-1]


def check_taken(count: int, step: int, start: int, cycle_length: int) -> None:
    """Raise a ValueError where there is nothing to average."""
    if count == 0:
        raise ValueError(
            f"there is no snapshot to average after {step} steps: the first falls after step "
            f"{first_snapshot(start, cycle_length)} (start={start}, cycle_length={cycle_length}); train for longer, "
            "or start earlier"
        )


def warn_no_snapshot(before: int, steps: int, start: int, cycle_length: int) -> None:
    """Warn before a run that takes no snapshot."""
    first = first_snapshot(start, cycle_length)
    last = before + steps - (before + steps - first) % cycle_length
    if last <= before or last < first:
        warnings.warn(
            f"start={start}: the {steps} steps of this run end before a snapshot falls, so that it adds nothing to the "
            "average",
            UserWarning,
            stacklevel=3,
        )


def check_state(name: str, given: Any, own: Any) -> None:
    """Raise a ValueError for a state of a run with other settings."""
    if given != own:
        raise ValueError(
            f"the state is of a run with {name}={given!r}, and this object has {name}={own!r}: make it with the "
            "settings of the state"
        )


def check_state_dict(state: Any, keys: tuple[str, ...]) -> None:
    """Raise a ValueError for what did not come from `state_dict`."""
    if not isinstance(state, Mapping) or any(key not in state for key in keys):
        what = f"a dict of {list(state)}" if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"state must be what state_dict() returned, got {what}: save svi.state_dict() of a run with these "
            "settings, and load that"
        )


def check_of_guide(others: list[str]) -> None:
    """Raise a ValueError for parameters that are not the guide's."""
    if others:
        raise ValueError(
            f"the param sites {others} of the model differ between snapshots, and draws of latent sites lack them: "
            "take snapshot_params, and predict(draw, ..., params=) with the values of each snapshot"
        )


def check_learning_rate(learning_rate: Any, start: int, cycle_length: int) -> None:
    """Look at the schedule of the optimiser around the first snapshot.

    Parameters
    ----------
    learning_rate
        A number, or a callable of the step, 0 for the first.
    start, cycle_length
        When snapshots fall.

    Raises
    ------
    ValueError
        If it is neither, or a value is out of range.

    Warns
    -----
    UserWarning
        If the rate comes back after a cycle and is lower in between.
    """
    first = first_snapshot(start, cycle_length) - 1
    rate = _rate_at(learning_rate, first)
    try:
        cycle = range(first, first + cycle_length, max(cycle_length // 200, 1))
        rates = {step: _rate_at(learning_rate, step) for step in (*cycle, first + cycle_length)}
    except ValueError:  # a schedule that ends with the run
        return
    lowest = min(rates, key=rates.__getitem__)
    if abs(rates[first + cycle_length] - rate) <= 1e-3 * rate and rates[lowest] < 0.9 * rate:
        warnings.warn(
            f"learning_rate is {rate:.3g} at the first snapshot (step {first}), and as low as {rates[lowest]:.3g} at "
            f"step {lowest}: snapshots belong where a cycle is lowest, with start={lowest + 1}",
            UserWarning,
            stacklevel=4,
        )


def warn_changed_rate(learning_rate: Any, first: int, step: int) -> bool:
    """Warn of a rate at a snapshot that is not that of the first one; steps count from 1. Whether it did."""
    before, now = _rate_at(learning_rate, first - 1), _rate_at(learning_rate, step - 1)
    if abs(now - before) <= 1e-3 * before:
        return False
    warnings.warn(
        f"learning_rate is {before:.3g} at the first snapshot (step {first - 1}) and {now:.3g} at a later one (step "
        f"{step - 1}): the average mixes laws of different learning rates. Start where the schedule is constant, or "
        "make cycle_length that of the schedule",
        UserWarning,
        stacklevel=4,
    )
    return True


def warn_other_rate(learning_rate: Any, step: int, used: float) -> bool:
    """Warn of a rate that is not the schedule's; steps count from 1. Whether it did."""
    expected = _rate_at(learning_rate, step - 1)
    if abs(used - expected) <= 1e-3 * expected:
        return False
    warnings.warn(
        f"learning_rate is {expected:.3g} at the snapshot after step {step}, and the optimiser used {used:.3g}: give "
        "the schedule that it has, and call optim.step() after each svi.step",
        UserWarning,
        stacklevel=4,
    )
    return True


def _rate_at(learning_rate: Any, step: int) -> float:
    check_values("learning_rate", 1.0 if callable(learning_rate) else learning_rate, (), positive=True)
    try:
        value = float(learning_rate(step)) if callable(learning_rate) else float(learning_rate)
    except Exception as error:
        raise ValueError(
            f"learning_rate must be a number or a callable of the step, got {learning_rate!r}, which fails at step "
            f"{step} ({error}): give the schedule that the optimiser has"
        ) from error
    check_values("learning_rate", lambda _: value, (step,), positive=False)
    return value
