"""How uncertain class probabilities are, and whether that tells right rows from wrong or foreign ones.

With p_s the class probabilities of draw s of the posterior::

    H(p) = -sum_k p_k log p_k,        I = H(mean_s p_s) - mean_s H(p_s) >= 0

H is the whole uncertainty, I what comes from not knowing the weights [1]_; in nats. Selective prediction [2]_ answers
the most certain rows only.

References
----------
.. [1] Houlsby et al. (2011), Bayesian active learning for classification and preference learning.
.. [2] Geifman & El-Yaniv (2017), Selective classification for deep neural networks.
"""

from typing import Any

import numpy as np
import xarray as xr
from scipy.special import entr

from bnn_ppl.diagnostics.checks import check_finite, check_probabilities, check_rows, correct


def predictive_entropy(probabilities: Any) -> np.ndarray:
    """Entropy of class probabilities, in nats: from 0 to log(classes).

    Parameters
    ----------
    probabilities
        Shape (rows, classes), summing to 1.

    Returns
    -------
    numpy.ndarray
        Shape (rows,).

    Raises
    ------
    ValueError
        If they are no probabilities.
    """
    return entr(check_probabilities("probabilities", probabilities)).sum(axis=-1)


def mutual_information(probabilities: Any, mean_entropy: Any = None) -> np.ndarray:
    """What the draws disagree on, in nats: the entropy of the average less the average of the entropies.

    Parameters
    ----------
    probabilities
        Of each draw, shape (draws, rows, classes); or their average, shape (rows, classes), with `mean_entropy`.
    mean_entropy
        Average over the draws of the entropy of each row, shape (rows,), in nats.

    Returns
    -------
    numpy.ndarray
        Shape (rows,), at least 0: what rounding takes below is set to 0.

    Raises
    ------
    ValueError
        If they are no probabilities, or `mean_entropy` does not fit them.
    """
    if mean_entropy is None:
        p = check_probabilities("probabilities", probabilities, ("draws", "rows", "classes"))
        average, entropies = p.mean(axis=0), entr(p).sum(axis=-1).mean(axis=0)
    else:
        average = check_probabilities("probabilities", probabilities)
        entropies = np.asarray(mean_entropy, np.float64)
        if entropies.shape != average.shape[:1]:
            raise ValueError(f"mean_entropy must have the shape {average.shape[:1]}, got {entropies.shape}")
        check_finite("mean_entropy", entropies)
    return np.maximum(entr(average).sum(axis=-1) - entropies, 0.0)


def _uncertainty(p: np.ndarray, uncertainty: Any) -> np.ndarray:
    if uncertainty is None:
        return 1.0 - p.max(axis=1)
    values = np.asarray(uncertainty, np.float64)
    if values.shape != p.shape[:1]:
        raise ValueError(f"uncertainty must have the shape {p.shape[:1]}, one value per row, got {values.shape}")
    check_finite("uncertainty", values)
    return values


def risk_coverage(probabilities: Any, labels: Any, *, uncertainty: Any = None) -> xr.Dataset:
    """Error rate among the most certain rows, over the share of rows that are kept [2]_.

    Parameters
    ----------
    probabilities
        Shape (rows, classes), summing to 1.
    labels
        Class numbers, shape (rows,).
    uncertainty
        Shape (rows,), larger where less certain; by default 1 - max_k p_k.

    Returns
    -------
    xarray.Dataset
        `risk` by `coverage` = 1 / rows, ..., 1; its attribute `area` is the mean of the risk. Equally uncertain rows
        are taken in random order, in expectation.

    Raises
    ------
    ValueError
        If the arguments do not fit together; the message names the argument and the value.
    """
    p, y = check_rows(probabilities, labels)
    _, group, size = np.unique(_uncertainty(p, uncertainty), return_inverse=True, return_counts=True)
    errors = np.bincount(group, weights=1.0 - correct(p, y)) / size
    kept = np.arange(1, len(y) + 1)
    risk = np.cumsum(np.repeat(errors, size)) / kept
    return xr.Dataset({"risk": ("coverage", risk)}, {"coverage": kept / len(y)}, {"area": float(risk.mean())})


def _auroc(low: np.ndarray, high: np.ndarray) -> float:
    """P(h > l) + P(h = l) / 2 for h of `high` and l of `low`; NaN where one is empty."""
    if not low.size or not high.size:
        return float("nan")
    ordered = np.sort(low)
    below = np.searchsorted(ordered, high, side="left") + np.searchsorted(ordered, high, side="right")
    return float(below.mean() / (2 * len(low)))


def selective_auroc(probabilities: Any, labels: Any, *, uncertainty: Any = None) -> float:
    """Probability that a wrong row is more uncertain than a right one, ties counted half.

    Parameters
    ----------
    probabilities
        Shape (rows, classes), summing to 1.
    labels
        Class numbers, shape (rows,).
    uncertainty
        Shape (rows,), larger where less certain; by default 1 - max_k p_k.

    Returns
    -------
    float
        From 0 to 1; NaN where all rows are right, or all are wrong.

    Raises
    ------
    ValueError
        If the arguments do not fit together; the message names the argument and the value.
    """
    p, y = check_rows(probabilities, labels)
    values, right = _uncertainty(p, uncertainty), correct(p, y) == 1
    return _auroc(values[right], values[~right])


def out_of_distribution_auroc(inside: Any, outside: Any) -> float:
    """Probability that a row from elsewhere is more uncertain than one of the data's kind, ties counted half.

    Parameters
    ----------
    inside, outside
        Uncertainties such as `predictive_entropy` or `mutual_information`, shapes (rows,) and (other rows,).

    Raises
    ------
    ValueError
        If one is empty, has another shape or is not finite.
    """
    scores = []
    for name, given in (("inside", inside), ("outside", outside)):
        values = np.asarray(given, np.float64)
        if values.ndim != 1 or not values.size:
            raise ValueError(f"{name} must have the shape (rows,) and be not empty, got {values.shape}")
        check_finite(name, values)
        scores.append(values)
    return _auroc(*scores)
