"""Norms of position and momentum over time, and how fast they change beside the Fokker-Planck equation's answer."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from bnn_ppl.diagnostics.weight_norm import MOMENTS, weight_norm

_LABELS = dict(zip(MOMENTS, (r"$\|\theta\|^2$", r"$\theta^\top r$", r"$\|r\|^2$"), strict=True))


def plot_weight_norm(
    tree: Any,
    *,
    part: str = "all",
    friction: float | None = None,
    mass: float | Mapping[str, float] | None = None,
    integrator: str | None = None,
    steps_per_draw: int | None = None,
    ax: Any = None,
) -> np.ndarray:
    """The squared norms of position and momentum and their product, over their measured and predicted rates.

    Parameters
    ----------
    tree
        From `bnn_ppl.to_arviz`, of SGHMC.
    part
        ``"all"``, or a site whose norms are in `sample_stats`.
    friction, mass, integrator, steps_per_draw
        As for `bnn_ppl.diagnostics.weight_norm`.
    ax
        Axes, shape (2, 3); by default a new figure.

    Returns
    -------
    numpy.ndarray of matplotlib.axes.Axes
        Shape (2, 3). Above the means over chains, with a band from the 5% to the 95% quantile of the chains where
        there are several, and what is expected at stationarity; below the rates, measured with two standard errors
        where there are several chains, and predicted.

    Raises
    ------
    ValueError
        If the tree lacks the statistics of such a kernel, `part` is unknown, or `ax` has another shape.
    """
    found = weight_norm(tree, friction=friction, mass=mass, integrator=integrator, steps_per_draw=steps_per_draw)
    if part not in found["part"].values:
        raise ValueError(f"part must be one of {found['part'].values.tolist()}, got {part!r}")
    found = found.sel(part=part)
    if ax is None:
        _, ax = plt.subplots(2, 3, figsize=(12, 5.5), sharex=True, layout="constrained")
    axes = np.asarray(ax, dtype=object)
    if axes.shape != (2, 3):
        raise ValueError(f"ax must have the shape (2, 3), for three norms and their rates, got {axes.shape}")
    time = found["time"].values
    middle = 0.5 * (time[1:] + time[:-1])
    for (above, below), moment in zip(axes.T, MOMENTS, strict=True):
        one, label = found.sel(moment=moment), _LABELS[moment]
        tracks = one["moments"].values
        above.plot(time, tracks.mean(axis=0), color="C0", label="mean over chains")
        if len(tracks) > 1:
            low, high = np.quantile(tracks, [0.05, 0.95], axis=0)
            above.fill_between(time, low, high, color="C0", alpha=0.25, lw=0, label="90% of the chains")
        if moment in found["statistic"].values:
            expected = float(found["expected"].sel(statistic=moment))
            above.axhline(expected, color="k", ls="--", lw=1, label="at stationarity")
        measured, error = one["measured_rate"].values, 2 * one["rate_error"].values
        below.plot(middle, measured, color="C0", lw=1, label="measured")
        if len(tracks) > 1:
            band = {"color": "C0", "alpha": 0.25, "lw": 0, "label": "2 standard errors"}
            below.fill_between(middle, measured - error, measured + error, **band)
        below.plot(middle, one["predicted_rate"], "k:", lw=1.5, label="Fokker-Planck")
        above.set(ylabel=label)
        below.set(ylabel=f"d/dt {label}", xlabel="time (steps × step size)")
        for panel in (above, below):
            panel.legend(fontsize="small")
    return axes
