"""Minibatches that come from an iterable, such as a data loader: cut to one length, epoch after epoch.

A kernel takes batches of B rows, B being the length of the first one. A shorter last batch is filled up with the
first rows of the next epoch, and what is left of those waits for the next batch, so that each row that the iterable
gives counts once an epoch, and every gradient has the same law and shape.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from bnn_ppl.layout import Plate
from bnn_ppl.namespaces import namespace
from bnn_ppl.settings import KernelSettings

Array = Any
_END = object()


def check_iterable(minibatches: Any, potential_fn: Any, settings: KernelSettings) -> None:
    """Raise a ValueError for an argument `minibatches` that is no iterable, or beside others that it excludes."""
    if minibatches is None:
        return
    if isinstance(minibatches, str | Mapping) or not hasattr(minibatches, "__iter__"):
        raise ValueError(
            f"minibatches must be an iterable of batches, such as a DataLoader or a list, got {minibatches!r}; arrays "
            "that fit in memory go to MCMC.run instead"
        )
    if hasattr(minibatches, "shape"):
        raise ValueError(
            f"minibatches is one array of shape {tuple(minibatches.shape)}: pass it to MCMC.run, and let a plate with "
            "subsample_size= take the minibatches"
        )
    others = {"potential_fn": potential_fn, "batch_size": settings.batch_size}
    for name, given in (others | {"control_variate": settings.control_variate}).items():
        if given is not None:
            raise ValueError(f"minibatches and {name}={given!r} exclude each other: leave one of the two out")
    if settings.subsampling != "epoch":
        raise ValueError(
            f"subsampling={settings.subsampling!r} has no effect with minibatches, whose order is the iterable's: "
            "leave it out"
        )


class BatchStream:
    """Batches of one length from an iterable, which is started again when it ends.

    Parameters
    ----------
    minibatches
        Gives batches: a tuple or list of arrays (positional arguments of the model), a dict of arrays (keyword
        arguments), or one array.
    as_array
        Makes a backend's array of what a batch holds; raises TypeError for what it cannot.
    """

    def __init__(self, minibatches: Any, as_array: Callable[[Any], Array]):
        self._minibatches = minibatches
        self._as_array = as_array
        self._names: list[str] | None = None
        self._form: list[tuple] | None = None
        self.iterator: Iterator | None = None
        self._waiting: list[Array] = self._fetch()
        self.rows = len(self._waiting[0])

    def peek(self) -> list[Array]:
        """Arrays of the batch that `next` gives next, or of one like it."""
        self._fill()
        return [leaf[: self.rows] for leaf in self._waiting]

    def next(self) -> list[Array]:
        """Arrays of the next batch, each with `rows` rows."""
        batch = self.peek()
        self._waiting = [leaf[self.rows :] for leaf in self._waiting]
        return batch

    def arguments(self, batch: list[Array], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A model's arguments: those of a batch, then those given to the host's MCMC.run."""
        if self._names is None:
            return (*batch, *args), kwargs
        return args, {**kwargs, **dict(zip(self._names, batch, strict=True))}

    def _fill(self) -> None:
        while len(self._waiting[0]) < self.rows:
            more = self._fetch()
            if len(self._waiting[0]) == 0:
                self._waiting = more
                continue
            pairs = zip(self._waiting, more, strict=True)
            self._waiting = [namespace(new).concatenate([old, new]) for old, new in pairs]

    def _fetch(self) -> list[Array]:
        batch = _END if self.iterator is None else next(self.iterator, _END)
        if batch is _END:
            why = "is empty" if self.iterator is None else "ended, and it cannot be started again"
            self.iterator = iter(self._minibatches)
            batch = next(self.iterator, _END)
        if batch is _END:
            raise ValueError(
                f"minibatches={self._minibatches!r} {why}: pass a DataLoader, a list, or another object whose iter() "
                "gives a new epoch"
            )
        leaves = self._leaves(batch)
        form = [(tuple(leaf.shape[1:]), leaf.dtype) for leaf in leaves]
        self._form = self._form or form
        if form != self._form:
            raise ValueError(
                "the arrays of each batch of minibatches must have the shapes, but for the rows, and the types of the "
                f"first batch, {self._form}, got {form}"
            )
        return leaves

    def _leaves(self, batch: Any) -> list[Array]:
        if isinstance(batch, Mapping):
            self._names = self._names or list(batch)
            if set(batch) != set(self._names):
                raise ValueError(f"a batch of minibatches has the keys {list(batch)}, and the first had {self._names}")
            values = [batch[name] for name in self._names]
        else:
            values = list(batch) if isinstance(batch, list | tuple) else [batch]
        try:
            leaves = [self._as_array(value) for value in values]
        except (TypeError, ValueError, RuntimeError) as error:  # NumPy and torch have their own for what is no array
            raise ValueError(
                "a batch of minibatches must be an array, or a tuple, list or dict of arrays, got "
                f"{type(batch).__name__} with {[type(value).__name__ for value in values]}"
            ) from error
        lengths = [leaf.shape[0] if len(leaf.shape) else None for leaf in leaves]
        if not leaves or None in lengths or len(set(lengths)) > 1 or lengths[0] == 0:
            raise ValueError(
                f"the arrays of a batch of minibatches must have the same number of rows, one or more, got the shapes "
                f"{[tuple(leaf.shape) for leaf in leaves]}"
            )
        return leaves


def check_plates(minibatches: Any, rows: int, plates: Mapping[str, Plate]) -> None:
    """Raise a ValueError unless a plate of the model states the number of rows of all minibatches together.

    Parameters
    ----------
    minibatches
        The iterable; its number of batches is used where it has one.
    rows
        Rows of a batch.
    plates
        The model's plates on one batch.
    """
    data = [plate for plate in plates.values() if plate.observes and plate.batch_size == rows]
    remedy = f'write plate("data", N, subsample_size={rows}) with N the rows of all batches, or subsample_size=len(x)'
    if not data:
        raise ValueError(f"no plate around the observed sites has the {rows} rows of a batch of minibatches: {remedy}")
    try:
        count = len(minibatches)
    except TypeError:
        count = None
    if count != 1 and all(plate.size == rows for plate in data):
        raise ValueError(
            f"plate {data[0].name!r} has only the {rows} rows of a batch, and minibatches has more of them, so that "
            f"the prior would count {'N / B' if count is None else count} times: {remedy}"
        )
    least, most = (0, np.inf) if count is None else ((count - 1) * rows, (count + 1) * rows)
    if not any(least < plate.size < most for plate in data):
        raise ValueError(
            f"plate {data[0].name!r} has {data[0].size} rows, but minibatches has {count} batches of {rows}: {remedy}"
        )
