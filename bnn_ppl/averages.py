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
from collections.abc import Callable, Iterable, Mapping
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


def check_swag_rank(rank: Any) -> None:
    """Raise a ValueError for a rank that is no number of deviations; that of 1 is for `check_averaging`."""
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 0:
        raise ValueError(f"rank must be an integer of at least 0, which takes variances alone, got {rank!r}")


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


def warn_few_columns(count: int, rank: int) -> None:
    """Warn where a low-rank covariance has fewer columns than it was asked for."""
    if count < rank:
        what = "no covariance, only variances" if count < 2 else f"a covariance of rank {count - 1} at most"
        warnings.warn(
            f"rank={rank} is more than the {count} snapshots so far, which tell {what}; it is scaled by their number",
            UserWarning,
            stacklevel=4,
        )


def check_locations(found: Iterable[str], fixed: Iterable[str], refused: Mapping[str, str], covariance: str) -> None:
    """Raise a ValueError for a guide some sites of which have no location to average.

    Parameters
    ----------
    found
        Sites that have one.
    fixed
        Those of them whose location no parameter moves.
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
    if fixed and covariance == "iterate":
        raise ValueError(
            f"no parameter of the guide moves the location of the sites {list(fixed)}, and covariance='iterate' has "
            "the variance of locations alone, 0: take covariance='mixture', which has the guide's own variances"
        )


def no_median(guide: Any) -> str:
    """Error text for the median of an average of parameters."""
    return (
        f"the guide {getattr(guide, '__name__', type(guide).__name__)}, whose parameters were averaged, has no median: "
        "give lambda *args, **kwargs: averaged(*args, **kwargs) in the place of the averaged guide, for the means of "
        "its draws"
    )
