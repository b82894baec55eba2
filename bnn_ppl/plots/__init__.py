"""Plots with matplotlib, one a file; each returns its Axes."""

try:
    import matplotlib  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("bnn_ppl.plots needs matplotlib: pip install 'bnn_ppl[plots]'") from error

from bnn_ppl.plots.log_alpha import plot_log_alpha
from bnn_ppl.plots.reliability import plot_reliability
from bnn_ppl.plots.temperatures import plot_temperatures
from bnn_ppl.plots.weight_norm import plot_weight_norm

__all__ = ["plot_log_alpha", "plot_reliability", "plot_temperatures", "plot_weight_norm"]
