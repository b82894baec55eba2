"""Which rows of the data are wanted, and the chunks in which a model sees them.

Chunks have exactly as many rows as a minibatch, the last one filled up and trimmed, because a model with a subsampled
plate sees that many rows and no others.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnn_ppl.layout import Plate
from bnn_ppl.results import Results, data_plates
from bnn_ppl.schedules import check_count

Arrays = dict[str, np.ndarray]


def check_rows(rows: Any, results: Results) -> Arrays:
    """Chosen rows by plate; a ValueError for what is no list of rows."""
    plates = results.plates
    if rows is None:
        return {}
    if not isinstance(rows, Mapping):
        data = data_plates(results)
        if len(data) != 1:
            raise ValueError(f"rows={rows!r} needs one plate of data, and the model has {data}: give a dict by plate")
        rows = {data[0]: rows}
    checked = {}
    for name, chosen in rows.items():
        if name not in plates:
            raise ValueError(f"rows names {name!r}, but the model's plates are {sorted(plates)}")
        size, indices = plates[name].size, np.asarray(chosen)
        if indices.ndim != 1 or not indices.size or indices.dtype.kind not in "iu":
            raise ValueError(f"rows of plate {name!r} must be a list of one or more integers, got {chosen!r}")
        if indices.min() < 0 or indices.max() >= size:
            raise ValueError(f"rows of plate {name!r} must be from 0 to {size - 1}, got {chosen!r}")
        checked[name] = indices
    return checked


def chunk_sizes(batch_size: int | Mapping[str, int] | None, plates: Mapping[str, Plate]) -> dict[str, int]:
    """Rows in a chunk by subsampled plate; a ValueError where the plates do not have as many."""
    sizes = {plate.name: plate.batch_size for plate in plates.values() if plate.subsampled}
    if batch_size is None:
        return sizes
    given = dict(batch_size) if isinstance(batch_size, Mapping) else dict.fromkeys(sizes, batch_size)
    if not given or not set(given) <= set(sizes):
        raise ValueError(f"batch_size={batch_size!r}: the subsampled plates of this run are {sorted(sizes)}")
    for name, count in given.items():
        check_count("batch_size", count)
        if count > plates[name].size:
            raise ValueError(f"batch_size={count} is larger than plate {name!r} of {plates[name].size} rows")
    return sizes | given


@dataclass(frozen=True)
class Plan:
    """Which rows are wanted, by plate, and in chunks of how many rows the subsampled plates take them."""

    results: Results
    rows: Arrays
    sizes: dict[str, int]

    def _chunks(self, plate: str) -> list[tuple[int, slice, np.ndarray]]:
        """Number, place in the wanted rows, and indices of each chunk; the last one is filled up."""
        wanted, size = self.rows.get(plate, np.arange(self.results.plates[plate].size)), self.sizes[plate]
        starts = range(0, len(wanted), size)
        chunks = [(i, slice(start, min(start + size, len(wanted)))) for i, start in enumerate(starts)]
        return [(i, s, np.pad(wanted[s], (0, size - (s.stop - s.start)), mode="edge")) for i, s in chunks]

    def _by_plates(self, names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
        """Sites in groups that lie in the same subsampled plates."""
        inside = {name: tuple(p for p in self.sizes if p in self.results.sites[name].plates) for name in names}
        for plates in dict.fromkeys(inside.values()):
            yield plates, [name for name in names if inside[name] == plates]

    def gather(self, names: Sequence[str], evaluate: Callable, event_dim: int | None) -> Arrays:
        """All wanted rows of some sites; `evaluate` is from the backend, `event_dim` as for the sites' `axes`."""
        first = {plate: np.arange(size) for plate, size in self.sizes.items()}
        zero = dict.fromkeys(self.sizes, 0)
        whole: Arrays = {}
        for plates, group in self._by_plates(names):
            for chunks in itertools.product(*(self._chunks(plate) for plate in plates)):
                at = dict(zip(plates, chunks, strict=True))
                indices = first | {plate: chunk[2] for plate, chunk in at.items()}
                values = evaluate(group, indices, zero | {plate: chunk[0] for plate, chunk in at.items()})
                for name in group:
                    self._put(whole, name, values[name], {plate: chunk[1] for plate, chunk in at.items()}, event_dim)
        return {name: whole[name] for name in names}

    def _put(
        self, whole: Arrays, name: str, value: np.ndarray, place: Mapping[str, slice], event_dim: int | None
    ) -> None:
        """Write one chunk of a site where it belongs."""
        shape, source, target = list(value.shape), [slice(None)] * value.ndim, [slice(None)] * value.ndim
        for plate, axis in self.results.sites[name].axes(value.shape, event_dim).items():
            plate_rows = self.results.plates[plate].size
            if plate in place and value.shape[axis] == self.sizes[plate]:
                shape[axis] = len(self.rows.get(plate, range(plate_rows)))
                source[axis] = slice(place[plate].stop - place[plate].start)
                target[axis] = place[plate]
            elif plate in self.rows and value.shape[axis] == plate_rows:
                value = np.take(value, self.rows[plate], axis)
                shape[axis] = value.shape[axis]
        if tuple(shape) == value.shape:
            whole[name] = value
            return
        if name not in whole:
            whole[name] = np.empty(shape, value.dtype)
        whole[name][tuple(target)] = value[tuple(source)]
