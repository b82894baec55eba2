"""Rows of data plates: set from outside, or all of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.primitives import Messenger


class SetPlates(Messenger):
    """Give plates their rows: `rows(name, size, subsample_size)` returns indices, or None to leave one alone."""

    def __init__(self, fn: Callable, rows: Callable[[str, int, int | None], Array | None]):
        super().__init__(fn)
        self.rows = rows

    def process_message(self, msg: dict) -> None:
        """Put the rows in; called by NumPyro."""
        if msg["type"] == "plate":
            size, subsample_size = msg["args"]
            indices = self.rows(msg["name"], size, subsample_size)
            if indices is not None:
                msg["value"] = indices
                msg["args"] = (size, indices.shape[0])


class FullData(NamedTuple):
    """A model whose subsampled plates hold all their rows; made by `full_data`."""

    model: Callable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on all rows."""
        whole = SetPlates(self.model, lambda name, size, subsample_size: jnp.arange(size))
        args, kwargs = as_arrays((args, kwargs))
        return whole(*args, **kwargs)


def full_data(model: Callable) -> Callable:
    """View of a model in which every subsampled plate holds all its rows.

    Parameters
    ----------
    model
        A NumPyro model; its data pass through the plate's indices or ``numpyro.subsample``.

    Returns
    -------
    callable
        The same model on the full data, for ``Predictive``, ``log_likelihood`` and everything else of the host
        that would silently see one minibatch otherwise.
    """
    return model if isinstance(model, FullData) else FullData(model)  # type: ignore[return-value]


def as_arrays(tree: Any) -> Any:
    """Model arguments with NumPy arrays made into JAX arrays, which traced indices can index."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) and x.dtype.kind in "biufc" else x, tree)
