"""Minibatches of an iterable inside a compiled loop: each gradient step calls back to Python for the next batch."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import io_callback

from bnn_ppl.batches import BatchStream, check_plates
from bnn_ppl.layout import Plate


class Loader:
    """One stream of batches a chain, told apart by the chain's key.

    Parameters
    ----------
    minibatches
        As given to the kernel.
    """

    def __init__(self, minibatches: Iterable):
        self._minibatches = minibatches
        self._streams: dict[bytes, BatchStream] = {}
        self._latest: dict[bytes, tuple[int, list[np.ndarray]]] = {}
        self._spare: BatchStream | None = None

    def start(self) -> None:
        """Forget the chains; those that come begin a new epoch."""
        self._streams, self._latest, self._spare = {}, {}, None

    @property
    def _first(self) -> BatchStream:
        """A stream to look at, which the first chain takes."""
        if self._streams:
            return next(iter(self._streams.values()))
        if self._spare is None:
            self._spare = BatchStream(self._minibatches, _as_array)
        return self._spare

    def check_plates(self, plates: Mapping[str, Plate]) -> None:
        """Raise a ValueError unless a plate states the rows of all batches."""
        check_plates(self._minibatches, self._first.rows, plates)

    def arguments(self, batch: list[Array] | None, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The model's arguments with a batch, by default the one that comes next."""
        stream = self._first
        if batch is None:
            batch = [jnp.asarray(leaf) for leaf in stream.peek()]
        return stream.arguments(batch, args, kwargs)

    def batch(self, words: Array, step: Array) -> list[Array]:
        """Arrays of the batch of a gradient step; `words` are the chain's."""
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in self._first.peek()]
        return io_callback(self._next, shapes, words, step)

    def _next(self, words: Any, step: Any) -> list[np.ndarray]:
        chain = np.asarray(words).tobytes()
        before, batch = self._latest.get(chain, (-1, []))
        if before == int(step):
            return batch
        if chain not in self._streams:
            self._streams[chain], self._spare = (
                self._first if not self._streams else BatchStream(self._minibatches, _as_array),
                None,
            )
        batch = self._streams[chain].next()
        self._latest[chain] = int(step), batch
        return batch


def _as_array(value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "biufc":
        raise TypeError
    return array.astype(jnp.result_type(array.dtype), copy=False)
