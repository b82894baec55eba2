"""Histogram of log alpha in each layer, with the threshold above which weights are pruned (Molchanov et al. 2017)."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from bnn_ppl.diagnostics.sparsity import check_log_alpha, sparsity

_FARTHEST = 20.0  # to which published implementations clip log alpha
_BINS = 60


def plot_log_alpha(
    log_alpha: Mapping[str, Any], *, threshold: float = 3.0, ax: Axes | Sequence[Axes] | None = None
) -> np.ndarray:
    """Histograms of log alpha, one for each site, with the share of the weights that a threshold prunes.

    Parameters
    ----------
    log_alpha
        By site, from a guide's `log_alpha` or from `bnn_ppl.diagnostics.log_alpha`.
    threshold
        The largest log alpha of a weight that is kept; the published one is 3, alpha = 20.
    ax
        One Axes for each site; by default a new figure.

    Returns
    -------
    numpy.ndarray of matplotlib.axes.Axes
        Shape (sites,): the number of weights in each bin, in logs, and the threshold dashed. The axis ends with the
        values, at -20 and 20 at the most; how many lie beyond, such as infinite ones, is written in the corners.

    Raises
    ------
    TypeError
        If `log_alpha` is no dict of arrays by site.
    ValueError
        If there are no sites or no weights, a value is NaN, `threshold` is no finite number, or `ax` has another
        number of Axes.

    Examples
    --------
    >>> plot_log_alpha(guide.log_alpha(params))  # guide.log_alpha() on Pyro
    """
    table = sparsity(log_alpha, threshold=threshold).iloc[1:]  # without that of all sites
    by_site = check_log_alpha(log_alpha)
    if ax is None:
        axes = _grid(len(by_site))
    else:
        axes = np.atleast_1d(np.asarray(ax, dtype=object)).reshape(-1)
    if len(axes) != len(by_site):
        raise ValueError(f"ax must have {len(by_site)} Axes, one for each site, got {len(axes)}")
    finite = np.concatenate([values[np.isfinite(values)] for values in by_site.values()])
    shown = np.append(np.clip(finite, -_FARTHEST, _FARTHEST), threshold)
    low, high = shown.min() - 0.5, shown.max() + 0.5
    for panel, (site, values), row in zip(axes, by_site.items(), table.itertuples(), strict=True):
        inside = values[(values >= low) & (values <= high)]
        counts, _, _ = panel.hist(inside, bins=_BINS, range=(low, high), color="C0")
        panel.axvline(threshold, color="k", ls="--", lw=1, label=f"threshold {threshold:g}")
        for beyond, words, x, side in (
            ((values < low).sum(), "← {:,} beyond the axis", 0.02, "left"),
            ((values > high).sum(), "{:,} beyond the axis →", 0.98, "right"),
        ):
            if beyond:
                panel.text(
                    x, 0.97, words.format(beyond), transform=panel.transAxes, ha=side, va="top", fontsize="small"
                )
        panel.set(
            xlim=(low, high),
            ylim=(0.5, 10 * max(counts.max(), 1)),  # with room for the words
            yscale="log",
            xlabel=r"$\log\,\alpha$",
            ylabel="weights in the bin",
            title=f"{site}\n{row.pruned:.1%} pruned, {row.kept:,} of {row.weights:,} kept",
        )
        panel.legend(loc="upper left", bbox_to_anchor=(0, 0.92), fontsize="small")
    return axes


def _grid(panels: int) -> np.ndarray:
    """Axes of a new figure, up to three in a row."""
    columns = min(panels, 3)
    rows = -(-panels // columns)
    _, grid = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), squeeze=False, layout="constrained")
    axes = grid.ravel()
    for unused in axes[panels:]:
        unused.set_axis_off()
    return axes[:panels]
