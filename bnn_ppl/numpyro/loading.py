"""Minibatches of an iterable inside a compiled loop: each gradient step calls back to Python for the next batch."""

from collections.abc import Iterable, Mapping
from threading import Lock
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
        self._lock = Lock()  # chains on several devices call back at once
        self._run: object = None
        self._forget()

    def __reduce__(self) -> tuple:
        """Without the streams, whose iterators no other process can go on with."""
        return Loader, (self._minibatches,)

    def _forget(self) -> None:
        self._streams: dict[bytes, BatchStream] = {}
        self._latest: dict[bytes, tuple[int, list[np.ndarray]]] = {}
        self._robbed: set[bytes] = set()
        self._form: BatchStream | None = None
        self._spare: BatchStream | None = None

    def start(self, run: object) -> None:
        """Begin a chain; the first one of a run, which is any object that its chains share, forgets those before."""
        jax.effects_barrier()  # which may still be taking batches, on a GPU
        if run is not self._run:
            self._run = run
            self._forget()

    def _look(self) -> tuple[BatchStream, list[np.ndarray]]:
        """What every stream is like, and a first batch. The first chain takes this stream."""
        if self._form is None:
            self._form = self._spare = BatchStream(self._minibatches, _as_array)
            self._example = self._form.peek()
        return self._form, self._example

    def check_plates(self, plates: Mapping[str, Plate]) -> None:
        """Raise a ValueError unless a plate states the rows of all batches."""
        check_plates(self._minibatches, self._look()[0].rows, plates)

    def arguments(self, batch: list[Array] | None, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The model's arguments with a batch, by default a first one."""
        form, example = self._look()
        return form.arguments([jnp.asarray(leaf) for leaf in example] if batch is None else batch, args, kwargs)

    def batch(self, words: Array, step: Array, before: Array) -> list[Array]:
        """Arrays of the batch of a gradient step.

        Parameters
        ----------
        words
            The chain's.
        step
            The gradient step, 0 where the chain starts.
        before
            Any number that was computed from the batch before: without it, XLA calls back in an order of its own.
        """
        _, example = self._look()
        shapes = [jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype)) for leaf in example]

        def next_batch(words: Any, step: Any, before: Any) -> list[np.ndarray]:
            batch = self._next(np.asarray(words).tobytes(), int(step))
            for leaf, shape in zip(batch, shapes, strict=True):
                if jax.dtypes.canonicalize_dtype(leaf.dtype) != shape.dtype:
                    raise ValueError(
                        f"minibatches of type {leaf.dtype} need 64 bits in the thread that loads them, which "
                        "jax.enable_x64 as a context does not reach: call numpyro.enable_x64() instead"
                    )
            return batch

        return io_callback(next_batch, shapes, words, step, before)

    def _next(self, chain: bytes, step: int) -> list[np.ndarray]:
        with self._lock:
            before, batch = self._latest.get(chain, (None, []))
            if before == step:
                return batch
            if step == 0 or chain not in self._streams:
                self._begin(chain)
            if chain in self._robbed:
                raise ValueError(
                    "iter(minibatches) gives one and the same iterator to several chains, and each needs its own "
                    "epochs: pass a list, a DataLoader with persistent_workers=False, or another object whose iter() "
                    "gives a new iterator, or run one chain"
                )
            batch = self._streams[chain].next()
            self._latest[chain] = step, batch
            return batch

    def _begin(self, chain: bytes) -> None:
        form, _ = self._look()
        stream = self._spare or BatchStream(self._minibatches, _as_array)
        stream.rows = form.rows  # whatever the length of its own first batch
        self._spare = None
        self._robbed |= {name for name, other in self._streams.items() if other.iterator is stream.iterator}
        self._robbed.discard(chain)
        self._streams[chain] = stream


def _as_array(value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "biufc":
        raise TypeError
    return array
