"""The usual plots of a run on one page."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from bnn_ppl.diagnostics.function_space import function_diagnostics
from bnn_ppl.plots.reliability import plot_reliability
from bnn_ppl.plots.temperatures import plot_temperatures


def plot_summary(
    tree: Any, predictions: xr.Dataset | None, functions: xr.DataArray | None, text: str | None = None
) -> Figure:
    """Temperatures, the function that converges worst, R-hat of all, and reliability, as far as they are given.

    Parameters
    ----------
    tree
        From `bnn_ppl.to_arviz`, of a kernel with temperatures; None without.
    predictions
        With `probabilities` and `observed`; None without.
    functions
        Function values (chain, draw, row, ...); None without.
    text
        Printed above the plots.

    Returns
    -------
    matplotlib.figure.Figure
    """
    temperatures = 0 if tree is None else 1 + ("kinetic_temperature" in tree["sample_stats"])
    panels = temperatures + 2 * (functions is not None) + (predictions is not None)
    rows = max(-(-panels // 2), 1)
    lines = 0 if text is None else text.count("\n") + 2
    height = 3.2 * rows + 0.155 * lines
    figure = Figure(figsize=(11, height), layout="constrained")
    top: Any = figure
    if text is not None:
        head, top = np.asarray(figure.subfigures(2, height_ratios=[0.155 * lines, 3.2 * rows]))
        head.text(0.01, 0.98, text, family="monospace", fontsize=8, va="top")
    axes = list(top.subplots(rows, 2, squeeze=False).ravel())
    for unused in axes[panels:]:
        unused.set_axis_off()
    if tree is not None:
        for panel in plot_temperatures(tree, ax=[axes.pop(0) for _ in range(temperatures)]):
            panel.set(xlabel="draw")
    if functions is not None:
        _plot_functions(functions, axes.pop(0), axes.pop(0))
    if predictions is not None:
        plot_reliability(predictions["probabilities"].values, predictions["observed"].values, ax=axes.pop(0))
    return figure


def _plot_functions(functions: xr.DataArray, trace: Any, histogram: Any) -> None:
    r_hat = function_diagnostics(functions)["r_hat"]
    known = r_hat.values[np.isfinite(r_hat.values)]
    histogram.hist(known, bins=30, color="tab:blue")
    histogram.axvline(1.01, color="k", ls="--", lw=1, label="1.01")
    histogram.set(xlabel="R-hat of function values", ylabel="number of values")
    histogram.legend()
    if not known.size:
        return
    at = {dim: int(i) for dim, i in r_hat.fillna(-np.inf).argmax(...).items()}
    for chain, values in enumerate(functions.isel(at).values):
        trace.plot(values, lw=0.8, label=f"chain {chain}")
    where = ", ".join(f"{dim} {functions[dim].values[i] if dim in functions.coords else i}" for dim, i in at.items())
    trace.set(xlabel="draw", ylabel=f"prediction ({where})", title="the function with the largest R-hat")
    trace.legend(loc="upper right", fontsize="small", ncols=2)
