"""Bayesian neural networks in Pyro and NumPyro: kernels and guides for the models you already have.

Where things are:

- ``bnn_ppl.numpyro`` and ``bnn_ppl.pyro``: kernels for the `MCMC` class of the host, under the same names on
  both sides. Each needs the extra of its name, such as ``pip install 'bnn_ppl[numpyro]'``.
- ``bnn_ppl.to_arviz``: the draws of either backend for ArviZ.
- ``bnn_ppl.report``: whether a run can be trusted, how good it is, and what to change.
- ``bnn_ppl.diagnostics`` and ``bnn_ppl.plots``: scores, convergence of predictions, temperatures.
- ``bnn_ppl.models``: networks and densities to start from.

Importing ``bnn_ppl`` loads neither JAX nor torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnn_ppl.diagnostics.report import report
    from bnn_ppl.export import to_arviz

__version__ = "0.1.0.dev0"
__all__ = ["__version__", "report", "to_arviz"]


def __getattr__(name: str) -> Any:
    # ArviZ takes over a second to import, so it is loaded with the first use.
    if name == "to_arviz":
        from bnn_ppl.export import to_arviz

        return to_arviz
    if name == "report":
        from bnn_ppl.diagnostics.report import report

        return report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
