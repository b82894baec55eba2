"""Scores of class probabilities: accuracy, proper scores, calibration.

With p_nk the probability of class k in row n, averaged over the posterior [1]_, and y_n the label::

    NLL   = -mean_n log p_n,y_n
    Brier = mean_n sum_k (p_nk - 1[y_n = k])^2
    ECE   = sum_b (N_b / N) |accuracy_b - confidence_b|,        MCE = max_b |accuracy_b - confidence_b|

where bin b has the N_b rows whose confidence max_k p_nk lies in (lower_b, upper_b] [2]_. Logarithms are natural.

References
----------
.. [1] Probabilities, not logits: then NLL(mean_s p_s) <= mean_s NLL(p_s), by Jensen's inequality.
.. [2] Guo, Pleiss, Sun & Weinberger (2017), On calibration of modern neural networks.
"""

from typing import Any

import numpy as np
import xarray as xr

from bnn_ppl.diagnostics.checks import check_rows, correct
from bnn_ppl.diagnostics.uncertainty import predictive_entropy, risk_coverage, selective_auroc
from bnn_ppl.schedules import check_count
from bnn_ppl.settings import check_choice


def accuracy(probabilities: Any, labels: Any) -> float:
    """Share of the rows whose most probable class is the label; ties go to the first class.

    Parameters
    ----------
    probabilities
        Shape (rows, classes), summing to 1.
    labels
        Class numbers, shape (rows,).

    Raises
    ------
    ValueError
        If they do not fit together; the message names the argument and the value.
    """
    return float(correct(*check_rows(probabilities, labels)).mean())


def nll(probabilities: Any, labels: Any, *, log: bool = False) -> float:
    """Mean negative log probability of the labels, in nats; infinite where a label has probability 0.

    Parameters
    ----------
    probabilities
        Shape (rows, classes), summing to 1.
    labels
        Class numbers, shape (rows,).
    log
        Whether `probabilities` are their natural logarithms, which keep what is too small for a float.

    Raises
    ------
    ValueError
        If they do not fit together; the message names the argument and the value.
    """
    if log:
        log_p = np.asarray(probabilities, np.float64)
        with np.errstate(over="ignore"):  # of logits, which are refused
            y = check_rows(np.exp(log_p), labels)[1]
    else:
        p, y = check_rows(probabilities, labels)
        with np.errstate(divide="ignore"):
            log_p = np.log(p)
    return float(-log_p[np.arange(len(y)), y].mean())


def brier(probabilities: Any, labels: Any) -> float:
    """Brier score as the sum over the classes, from 0 to 2: for two classes twice the one-column form.

    Parameters
    ----------
    probabilities
        Shape (rows, classes), summing to 1.
    labels
        Class numbers, shape (rows,).

    Raises
    ------
    ValueError
        If they do not fit together; the message names the argument and the value.
    """
    p, y = check_rows(probabilities, labels)
    return float(((p - np.eye(p.shape[1])[y]) ** 2).sum(axis=1).mean())


def reliability(probabilities: Any, labels: Any, *, bins: int = 15, binning: str = "equal_width") -> xr.Dataset:
    """Accuracy beside confidence, in bins of the confidence.

    Parameters
    ----------
    probabilities
        Shape (rows, classes), summing to 1.
    labels
        Class numbers, shape (rows,).
    bins
        How many, at least 1.
    binning
        ``"equal_width"``: edges 0, 1 / bins, ..., 1; ``"equal_mass"``: edges at quantiles of the confidence, where
        equal confidences share a bin. A bin contains its upper edge.

    Returns
    -------
    xarray.Dataset
        By `bin`: `lower` and `upper` edge, `count` of rows, mean `confidence` and `accuracy`, NaN in empty bins.

    Raises
    ------
    ValueError
        If the arguments do not fit together; the message names the argument and the value.
    """
    p, y = check_rows(probabilities, labels)
    check_count("bins", bins)
    check_choice("binning", binning, ("equal_width", "equal_mass"))
    confidence = p.max(axis=1)
    edges = np.linspace(0.0, 1.0, bins + 1)
    if binning == "equal_mass":
        edges = np.quantile(confidence, edges)
    index = np.searchsorted(edges[1:-1], confidence, side="left")
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = {
            name: np.bincount(index, weights=values, minlength=bins) / count
            for name, values in (("confidence", confidence), ("accuracy", correct(p, y)))
        }
    columns = {"lower": edges[:-1], "upper": edges[1:], "count": count, **means}
    return xr.Dataset({name: ("bin", values) for name, values in columns.items()})


def calibration_error(
    probabilities: Any, labels: Any, *, bins: int = 15, binning: str = "equal_width", norm: str = "l1"
) -> float:
    """Expected (ECE) or maximum (MCE) calibration error of the confidence.

    Parameters
    ----------
    probabilities
        Shape (rows, classes), summing to 1.
    labels
        Class numbers, shape (rows,).
    bins, binning
        As for `reliability`; common are 15 of equal width and 20 of equal mass.
    norm
        ``"l1"``: the distance of accuracy and confidence, mean over the rows of that of their bins (ECE); ``"max"``:
        the largest over the bins with any rows (MCE).

    Raises
    ------
    ValueError
        If the arguments do not fit together; the message names the argument and the value.
    """
    check_choice("norm", norm, ("l1", "max"))
    table = reliability(probabilities, labels, bins=bins, binning=binning)
    gap = abs(table["accuracy"] - table["confidence"])
    if norm == "max":
        return float(gap.max())
    return float((gap * table["count"]).sum() / table["count"].sum())


def classification_scores(
    probabilities: Any, labels: Any, *, bins: int = 15, binning: str = "equal_width"
) -> dict[str, float]:
    """All scores that need no more than the averaged probabilities.

    Parameters
    ----------
    probabilities
        Shape (rows, classes), summing to 1.
    labels
        Class numbers, shape (rows,).
    bins, binning
        Of the calibration errors, as for `reliability`.

    Returns
    -------
    dict
        `accuracy`, `nll`, `brier`, `ece`, `mce`, `entropy` (mean), `selective_area` (of `risk_coverage`) and
        `selective_auroc`.

    Raises
    ------
    ValueError
        If the arguments do not fit together; the message names the argument and the value.
    """
    return {
        "accuracy": accuracy(probabilities, labels),
        "nll": nll(probabilities, labels),
        "brier": brier(probabilities, labels),
        "ece": calibration_error(probabilities, labels, bins=bins, binning=binning),
        "mce": calibration_error(probabilities, labels, bins=bins, binning=binning, norm="max"),
        "entropy": float(predictive_entropy(probabilities).mean()),
        "selective_area": risk_coverage(probabilities, labels).attrs["area"],
        "selective_auroc": selective_auroc(probabilities, labels),
    }
