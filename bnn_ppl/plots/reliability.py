"""Reliability diagram: accuracy over confidence, with the rows in each bin (Guo et al. 2017)."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from bnn_ppl.diagnostics.classification import reliability


def plot_reliability(
    probabilities: Any, labels: Any, *, bins: int = 15, binning: str = "equal_width", ax: Axes | None = None
) -> Axes:
    """Accuracy in bins of the confidence, over the diagonal of a calibrated prediction.

    Parameters
    ----------
    probabilities
        Averaged over the posterior, shape (rows, classes), summing to 1.
    labels
        Class numbers, shape (rows,).
    bins, binning
        As for `bnn_ppl.diagnostics.reliability`.
    ax
        Where to draw; by default a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        With the mean confidence and accuracy of each bin, bars of two standard errors (binomial, as if the calibration
        were right) about the diagonal, and on an axis of its own at the right the rows of each bin as bars, in logs.

    Raises
    ------
    ValueError
        If the arguments do not fit together; the message names the argument and the value.
    """
    table = reliability(probabilities, labels, bins=bins, binning=binning)
    table = table.isel(bin=np.flatnonzero(table["count"].values))
    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    confidence, count = table["confidence"].values, table["count"].values
    counts = ax.twinx()
    lower, upper = table["lower"].values, table["upper"].values
    counts.bar(lower, count, upper - lower, align="edge", color="0.88", edgecolor="white")
    counts.set(yscale="log", ylim=(0.5, 1.3 * count.max()), ylabel="rows in the bin")
    ax.set_zorder(counts.get_zorder() + 1)
    ax.patch.set_visible(False)
    error = 2 * np.sqrt(confidence * (1 - confidence) / count)
    ax.plot([0, 1], [0, 1], "--", color="0.4", label="calibrated")
    ax.errorbar(confidence, confidence, error, fmt="none", ecolor="0.4", capsize=2, label="2 standard errors")
    ax.plot(confidence, table["accuracy"], "o-", color="C0", label="prediction")
    ax.set(xlim=(min(lower.min(), confidence.min(), 0.95), 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
    ax.legend(loc="upper left")
    return ax
