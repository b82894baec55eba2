"""Kinetic and configurational temperature of each chain over its draws (Wenzel et al. 2020)."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from bnn_ppl.diagnostics.temperature import temperature_band
from bnn_ppl.diagnostics.temperature_table import temperature_series


def plot_temperatures(
    tree: Any, *, part: str = "all", curvature: float = 0.0, level: float = 0.99, ax: Sequence[Axes] | None = None
) -> np.ndarray:
    """Both temperatures over the draws, with what they should be.

    Parameters
    ----------
    tree
        From `bnn_ppl.to_arviz`, of a kernel of this library.
    part
        ``"all"``, or a site whose temperatures are in `sample_stats`.
    curvature
        Mean curvature k of U per coordinate, where it is known, for the kinetic temperature under symplectic Euler.
    level
        Probability of the band in which a kinetic temperature lies, where the dimension is known.
    ax
        Two Axes, or one for a kernel without momentum; by default a new figure.

    Returns
    -------
    numpy.ndarray of matplotlib.axes.Axes
        Kinetic (where there is a momentum) and configurational temperature: a line for each chain, the expected value
        dashed, and the band of the kinetic one.

    Raises
    ------
    ValueError
        If the tree lacks the statistics of such a kernel, `part` is unknown, or `ax` has another number of Axes.
    """
    series = temperature_series(tree, curvature=curvature)
    if part not in series["part"].values:
        raise ValueError(f"part must be one of {series['part'].values.tolist()}, got {part!r}")
    series = series.sel(part=part)
    kinds = [kind for kind in ("kinetic", "configurational") if kind in series]
    if ax is None:
        _, axes = plt.subplots(len(kinds), sharex=True, squeeze=False, layout="constrained")
    else:
        axes = np.atleast_1d(np.asarray(ax, dtype=object))
    axes = axes.reshape(-1)
    if len(axes) != len(kinds):
        raise ValueError(f"ax must have {len(kinds)} Axes, for {' and '.join(kinds)}, got {len(axes)}")
    draws = np.arange(series.sizes["draw"])
    for panel, kind in zip(axes, kinds, strict=True):
        expected = series["expected_kinetic" if kind == "kinetic" else "temperature"].values[0]
        if kind == "kinetic" and np.isfinite(series["dimension"]):
            low, high = temperature_band(float(series["dimension"]), level=level)
            panel.fill_between(draws, low * expected, high * expected, color="0.85", label=f"{level:.0%} of draws")
        for chain, values in enumerate(series[kind].values):
            panel.plot(draws, values, lw=0.8, label=f"chain {chain}")
        panel.plot(draws, expected, "k--", lw=1.2, label="expected" if kind == "kinetic" else "temperature")
        panel.set(ylabel=f"{kind} temperature")
        panel.legend(loc="upper right", fontsize="small", ncols=2)
    axes[-1].set(xlabel="draw")
    return axes
