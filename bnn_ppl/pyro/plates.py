"""Rows of data plates: set from outside, or all of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger, _Subsample
from torch import Tensor


@contextmanager
def any_number_of_rows() -> Iterator[None]:
    """Let plates accept a number of rows other than their subsample_size, which Pyro refuses."""
    original = SubsampleMessenger._subsample

    def lenient(name: str, size: int | None = None, subsample_size: int | None = None, *rest: Any) -> tuple:
        if size is None:
            return original(name, size, subsample_size, *rest)
        return original(name, size, None, *rest)

    SubsampleMessenger._subsample = staticmethod(lenient)
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(original)


class SetPlates(Messenger):
    """Give plates their rows: `rows(name, fn)` returns indices, or None to leave one alone."""

    def __init__(self, rows: Callable[[str, _Subsample], Tensor | None]):
        super().__init__()
        self.rows = rows

    def _pyro_sample(self, msg: dict) -> None:
        if isinstance(msg["fn"], _Subsample):
            indices = self.rows(msg["name"], msg["fn"])
            if indices is not None:
                msg["value"] = indices


class FullData(NamedTuple):
    """A model whose subsampled plates hold all their rows; made by `full_data`."""

    model: Callable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on all rows."""
        with any_number_of_rows(), SetPlates(lambda name, fn: torch.arange(fn.size, device=fn.device)):
            return self.model(*args, **kwargs)


def full_data(model: Callable) -> Callable:
    """View of a model in which every subsampled plate holds all its rows.

    Parameters
    ----------
    model
        A Pyro model; its data pass through the plate's indices or ``pyro.subsample``.

    Returns
    -------
    callable
        The same model on the full data, for ``Predictive``, ``log_likelihood`` and everything else of the host
        that would silently see one minibatch otherwise.
    """
    return model if isinstance(model, FullData) else FullData(model)  # type: ignore[return-value]
