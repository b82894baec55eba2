"""Running averages of weights, or of the laws of a guide, over the snapshots of an SVI run.

The n-th snapshot has the locations mu_n and the variances v_n of the guide's sites in unconstrained coordinates. With
the weight w_n of a new snapshot, 1 / (n + 1) for equal ones and 1 for the first, the moments are kept as in [1]_ [2]_::

    d = mu_n - m,   m += w_n d,   S = (1 - w_n) (S + w_n d^2),   v += w_n (v_n - v)

and never as a second moment minus a squared mean, which cancels in single precision. K deviations
d_n = mu_n - m, each from the mean that includes it, are the columns of D. The averaged law is N(m, Sigma) with::

    "mixture"     Sigma = diag(v + S)                                  the moments of the mixture of the laws
    "iterate"     Sigma = diag(S)                                      SWAG-Diag [3]_ of the locations
    "low_rank"    Sigma = diag(v + S / 2) + D D' / (2 (K - 1))         SWAG [3]_, and what the laws have within;
                  D weighs its columns alike, whatever w is
    "parameters"  the guide at the average of its unconstrained parameters, SWA [4]_

References
----------
.. [1] Welford (1962), Note on a method for calculating corrected sums of squares and products.
.. [2] West (1979), Updating mean and variance estimates: an improved method.
.. [3] Maddox, Garipov, Izmailov, Vetrov & Wilson (2019), A simple baseline for Bayesian uncertainty in deep learning.
.. [4] Izmailov, Podoprikhin, Garipov, Vetrov & Wilson (2018), Averaging weights leads to wider optima and better
   generalization.
"""

import numbers
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bnn_ppl.schedules import check_count, check_values
from bnn_ppl.settings import check_choice

COVARIANCES = ("mixture", "iterate", "low_rank", "parameters")
# What a variance of 0, of a weight that never moved, is taken for in a law, as in the reference code of SWAG.
LEAST_VARIANCE = 1e-30

Multiplier = Callable[[Any], Any] | None


def weight_of(multiplier: Multiplier, number: Any) -> Any:
    """Weight of the snapshot of this number, above 0; that of the first is 1."""
    return 1 / (number + 1) if multiplier is None else multiplier(number)


def add_to_mean(mean: Any, value: Any, weight: Any) -> Any:
    """Mean with one value more."""
    return mean + weight * (value - mean)


def add_to_spread(spread: Any, mean: Any, value: Any, weight: Any) -> Any:
    """Variance about the mean with one value more, from the mean without it."""
    return (1 - weight) * (spread + weight * (value - mean) ** 2)


def variance(covariance: str, within: Any, spread: Any) -> Any:
    """Variances of the averaged law, beside its columns."""
    if covariance == "iterate":
        return spread
    return within + (spread / 2 if covariance == "low_rank" else spread)


def columns_scale(columns: int) -> float:
    """What a sum over so many deviation columns is multiplied with: it takes two to tell a covariance."""
    return (2 * (columns - 1)) ** -0.5 if columns > 1 else 0.0


def weights_in_mean(multiplier: Multiplier, count: int) -> np.ndarray:
    """Weights that `count` snapshots have in their mean, shape (count,), with the sum 1."""
    weights = np.ones(count)
    for number in range(1, count):
        weights[number] = float(weight_of(multiplier, number))
        weights[:number] *= 1 - weights[number]
    return weights


def check_snapshots(start: Any, cycle_length: Any) -> None:
    """Raise a ValueError unless these say after which steps snapshots fall."""
    if isinstance(start, bool) or not isinstance(start, numbers.Integral) or start < 0:
        raise ValueError(f"start must be an integer of at least 0, the steps before the first snapshot, got {start!r}")
    check_count("cycle_length", cycle_length)


def check_averaging(covariance: Any, rank: Any, multiplier: Any) -> None:
    """Raise a ValueError for an unknown covariance, a rank below 2, or weights outside (0, 1]."""
    check_choice("covariance", covariance, COVARIANCES)
    check_count("rank", rank)
    if rank < 2:
        raise ValueError(f"rank must be at least 2, for one deviation tells no covariance, got {rank!r}")
    if multiplier is None:
        return
    if not callable(multiplier):
        raise ValueError(
            f"multiplier must be None or a callable of the number of earlier snapshots, got {multiplier!r}: "
            f"for a constant weight give lambda n: {multiplier!r}"
        )
    check_values("multiplier", multiplier, range(1, 100), positive=True)
    for number in range(1, 100):
        if not 0 < float(multiplier(number)) <= 1:
            raise ValueError(
                f"multiplier must return weights in (0, 1], got {multiplier(number)!r} for snapshot {number}, "
                "counted from 0"
            )


def check_state(name: str, given: Any, own: Any) -> None:
    """Raise a ValueError for a state of a run with other settings."""
    if given != own:
        raise ValueError(
            f"the state is of a run with {name}={given!r}, and this object has {name}={own!r}: make it with the "
            "settings of the state"
        )


def check_of_guide(others: list[str]) -> None:
    """Raise a ValueError for parameters that are not the guide's."""
    if others:
        raise ValueError(
            f"the param sites {others} of the model differ between snapshots, and draws of latent sites lack them: "
            "take snapshot_params, and predict(draw, ..., params=) with the values of each snapshot"
        )


def check_points(noisy: list[str]) -> None:
    """Raise a ValueError for a guide whose sites are more than points."""
    if noisy:
        raise ValueError(
            f"SWAG takes a guide of points, such as AutoDelta, and sites {noisy} of this one have noise of their own: "
            "take HWASVI(covariance='low_rank'), which adds their variances"
        )


def check_moments(covariance: str) -> None:
    """Raise a ValueError where parameters are averaged and not laws."""
    if covariance == "parameters":
        raise ValueError("covariance='parameters' averages parameters, and has no moments: see averaged_params")


def first_snapshot(start: int, cycle_length: int) -> int:
    """Number of steps after which the first snapshot falls: a start of 0 has taken no step yet."""
    return start or cycle_length


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


def warn_few_columns(count: int, rank: int) -> None:
    """Warn where a low-rank covariance has fewer columns than it was asked for."""
    if count < rank:
        what = "no covariance, only variances" if count < 2 else f"a covariance of rank {count - 1} at most"
        warnings.warn(
            f"rank={rank} is more than the {count} snapshots so far, which tell {what}; it is scaled by their number",
            UserWarning,
            stacklevel=4,
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


def check_locations(found: Mapping[str, Any], refused: Mapping[str, str], covariance: str) -> None:
    """Raise a ValueError for a guide some sites of which have no location to average.

    Parameters
    ----------
    found
        Sites that have one.
    refused
        By site, in words, why it has none.
    covariance
        As given.
    """
    for name, why in refused.items():
        raise ValueError(
            f"site {name!r} of the guide {why}, and covariance={covariance!r} averages locations: take "
            "covariance='parameters', which averages the parameters of any guide"
        )
    if not found:
        raise ValueError(
            f"the guide has no latent site with a location, and covariance={covariance!r} averages locations: take "
            "covariance='parameters'"
        )
