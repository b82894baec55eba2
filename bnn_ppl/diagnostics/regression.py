"""Scores of predictive distributions of one real target: RMSE, log density, CRPS, coverage.

The predictive distribution is Gaussian, or the mixture over S draws of the posterior, F = mean_s N(m_s, v_s^2)::

    log density = log mean_s N(y; m_s, v_s^2)                        (log-mean-exp, never the mean of the logarithms)
    CRPS        = mean_s A(y - m_s, v_s) - 1/2 mean_s,t A(m_s - m_t, sqrt(v_s^2 + v_t^2))            [1]_
    A(m, v)     = 2 v phi(m / v) + m (2 Phi(m / v) - 1)

A central interval of level l has the target in it where (1 - l) / 2 <= F(y) <= (1 + l) / 2. For a network trained on
y / c, `target_scale` c gives scores in the units of y: the log density is less by log c.

References
----------
.. [1] Grimit, Gneiting, Berrocal & Johnson (2006), The continuous ranked probability score for circular variables.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import logsumexp, ndtr

from bnn_ppl.diagnostics.checks import check_finite

_PAIRS = 2_000_000  # of draws held at a time, 16 MB an array


def _check_number(name: str, value: Any, low: float, high: float) -> float:
    if not low < value < high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, got {value!r}")
    return float(value)


def _check(name: str, values: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values as (draws, rows) and targets as (rows,)."""
    y, x = np.asarray(targets, np.float64), np.asarray(values, np.float64)
    if y.ndim != 1 or not y.size:
        raise ValueError(f"targets must have the shape (rows,) and be not empty, got {y.shape}: squeeze the targets")
    if x.ndim not in (1, 2) or not x.size or x.shape[-1] != len(y):
        raise ValueError(f"{name} must have the shape ({len(y)},) or (draws, {len(y)}) as targets has, got {x.shape}")
    check_finite(name, x)
    check_finite("targets", y)
    return x.reshape(-1, len(y)), y


def _check_gaussian(mean: Any, sd: Any, targets: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means and sds as (draws, rows), targets as (rows,)."""
    m, y = _check("mean", mean, targets)
    v = np.asarray(sd, np.float64)
    check_finite("sd", v)
    if (v <= 0).any():
        raise ValueError(
            f"sd must be above 0, got {v.min():.4g}: give standard deviations of the targets, noise included"
        )
    try:
        v = np.broadcast_to(v, m.shape)
    except ValueError:
        raise ValueError(f"sd must have the shape of mean {m.shape} or broadcast to it, got {v.shape}") from None
    return m, v, y


def rmse(mean: Any, targets: Any, *, target_scale: float = 1.0) -> float:
    """Root mean squared error of the predictive mean, in the units of the targets.

    Parameters
    ----------
    mean
        Predictive mean, shape (rows,), or that of each draw, shape (draws, rows), of which the average is taken.
    targets
        Shape (rows,).
    target_scale
        c by which the targets were divided for training, to score in their units.

    Raises
    ------
    ValueError
        If the arguments do not fit together; the message names the argument and the value.
    """
    m, y = _check("mean", mean, targets)
    return float(np.sqrt(((m.mean(axis=0) - y) ** 2).mean())) * _check_number("target_scale", target_scale, 0, np.inf)


def log_density(mean: Any, sd: Any, targets: Any, *, target_scale: float = 1.0) -> float:
    """Mean over the rows of the log predictive density, of a Gaussian or a mixture over draws, in nats.

    Parameters
    ----------
    mean, sd
        Of the target, noise included: shape (rows,), or of each draw, shape (draws, rows); `sd` may broadcast.
    targets
        Shape (rows,).
    target_scale
        c by which the targets were divided for training, to score in their units: the result is less by log c.

    Raises
    ------
    ValueError
        If the arguments do not fit together; the message names the argument and the value.
    """
    m, v, y = _check_gaussian(mean, sd, targets)
    log_p = -0.5 * ((y - m) / v) ** 2 - np.log(v) - 0.5 * np.log(2 * np.pi)
    scale = _check_number("target_scale", target_scale, 0, np.inf)
    return float((logsumexp(log_p, axis=0) - np.log(len(m))).mean() - np.log(scale))


def _expected_distance(m: np.ndarray, v: np.ndarray) -> np.ndarray:
    """E|X| of X ~ N(m, v^2)."""
    z = m / v
    return v * np.sqrt(2 / np.pi) * np.exp(-0.5 * z**2) + m * (2 * ndtr(z) - 1)


def crps(mean: Any, sd: Any, targets: Any, *, target_scale: float = 1.0) -> float:
    """Mean continuous ranked probability score of a Gaussian or a mixture over draws, in the units of the targets.

    Parameters
    ----------
    mean, sd
        Of the target, noise included: shape (rows,), or of each draw, shape (draws, rows); `sd` may broadcast. The
        time grows as draws^2 x rows: a second for 100 million. `sample_crps` takes less for many draws.
    targets
        Shape (rows,).
    target_scale
        c by which the targets were divided for training, to score in their units.

    Raises
    ------
    ValueError
        If the arguments do not fit together; the message names the argument and the value.
    """
    m, v, y = _check_gaussian(mean, sd, targets)
    scores = _expected_distance(y - m, v).mean(axis=0)
    for rows in np.array_split(np.arange(len(y)), -(-len(y) * len(m) ** 2 // _PAIRS)):
        between, spread = m[:, None, rows] - m[None, :, rows], np.hypot(v[:, None, rows], v[None, :, rows])
        scores[rows] -= 0.5 * _expected_distance(between, spread).mean(axis=(0, 1))
    return float(scores.mean()) * _check_number("target_scale", target_scale, 0, np.inf)


def sample_crps(draws: Any, targets: Any, *, target_scale: float = 1.0) -> float:
    """Mean continuous ranked probability score from predictive draws, in the units of the targets.

    Parameters
    ----------
    draws
        Draws of the target, noise included, shape (draws, rows), at least 2.
    targets
        Shape (rows,).
    target_scale
        c by which the targets were divided for training, to score in their units.

    Raises
    ------
    ImportError
        If scoringrules is not installed, whose fair estimator this is: unbiased for independent draws.
    ValueError
        If the arguments do not fit together; the message names the argument and the value.
    """
    x, y = _check_draws(draws, targets)
    try:
        import scoringrules
    except ModuleNotFoundError as error:
        raise ImportError("sample_crps needs scoringrules: pip install 'bnn_ppl[scores]'") from error
    scores = scoringrules.crps_ensemble(y, x.T, estimator="fair")
    return float(np.mean(scores)) * _check_number("target_scale", target_scale, 0, np.inf)


def _check_draws(draws: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = _check("draws", draws, targets)
    if len(x) < 2:
        raise ValueError(f"draws must have the shape (draws, {len(y)}) with at least 2 draws, got {np.shape(draws)}")
    return x, y


def coverage(mean: Any, sd: Any, targets: Any, *, level: float = 0.9) -> float:
    """Share of the targets inside central predictive intervals, of a Gaussian or a mixture over draws.

    Parameters
    ----------
    mean, sd
        Of the target, noise included: shape (rows,), or of each draw, shape (draws, rows); `sd` may broadcast.
    targets
        Shape (rows,).
    level
        Probability of the interval, between 0 and 1: what a calibrated prediction covers.

    Raises
    ------
    ValueError
        If the arguments do not fit together; the message names the argument and the value.
    """
    m, v, y = _check_gaussian(mean, sd, targets)
    return _inside(ndtr((y - m) / v).mean(axis=0), level)


def sample_coverage(draws: Any, targets: Any, *, level: float = 0.9) -> float:
    """Share of the targets inside central predictive intervals of draws.

    Parameters
    ----------
    draws
        Draws of the target, noise included, shape (draws, rows), at least 2.
    targets
        Shape (rows,).
    level
        Probability of the interval, between 0 and 1: what a calibrated prediction covers.

    Raises
    ------
    ValueError
        If the arguments do not fit together; the message names the argument and the value.

    Notes
    -----
    F(y) is (rank + 1/2) / (draws + 1), where the rank counts the draws below y, and half of those equal to it.
    """
    x, y = _check_draws(draws, targets)
    rank = (x < y).sum(axis=0) + 0.5 * (x == y).sum(axis=0)
    return _inside((rank + 0.5) / (len(x) + 1), level)


def _inside(position: np.ndarray, level: float) -> float:
    return float((np.abs(position - 0.5) <= 0.5 * _check_number("level", level, 0, 1)).mean())


def regression_scores(
    mean: Any,
    sd: Any,
    targets: Any,
    *,
    draws: Any = None,
    levels: Sequence[float] = (0.5, 0.9, 0.95),
    target_scale: float = 1.0,
) -> dict[str, float]:
    """All scores of one predictive distribution.

    Parameters
    ----------
    mean, sd
        Of the target, noise included: shape (rows,), or of each draw, shape (draws, rows); `sd` may broadcast.
    targets
        Shape (rows,).
    draws
        Draws of the target, shape (draws, rows): CRPS and coverage are then theirs, and not those of the Gaussian.
    levels
        Of the intervals, between 0 and 1.
    target_scale
        c by which the targets were divided for training, to score in their units.

    Returns
    -------
    dict
        `rmse`, `log_density`, `crps`, and `coverage_90` and so on by level in percent.

    Raises
    ------
    ImportError
        If `draws` are given and scoringrules is not installed.
    ValueError
        If the arguments do not fit together; the message names the argument and the value.
    """
    scores = {
        "rmse": rmse(mean, targets, target_scale=target_scale),
        "log_density": log_density(mean, sd, targets, target_scale=target_scale),
    }
    if draws is None:
        scores["crps"] = crps(mean, sd, targets, target_scale=target_scale)
        return scores | {f"coverage_{100 * x:g}": coverage(mean, sd, targets, level=x) for x in levels}
    scores["crps"] = sample_crps(draws, targets, target_scale=target_scale)
    return scores | {f"coverage_{100 * x:g}": sample_coverage(draws, targets, level=x) for x in levels}
