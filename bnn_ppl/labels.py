"""Names of the dimensions and values of the coordinates of what `bnn_ppl.to_arviz` gives."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from bnn_ppl.results import data_plates
from bnn_ppl.statistics import MOMENTUM, POSITION

Arrays = dict[str, np.ndarray]
BY_SITE = tuple(name for name in (*POSITION, *MOMENTUM) if name.startswith("site_"))


def plain(name: str) -> str:
    """Name without slashes, which a DataTree takes for paths and NumPyro's modules put between their parts."""
    return name.replace("/", ".")


class Labels:
    """Names of dimensions and values of coordinates."""

    def __init__(self, results: Any, dims: Mapping[str, Sequence[str]] | None, coords: Mapping[str, Any] | None):
        self.results = results
        self.dims = {plain(n): [given] if isinstance(given, str) else list(given) for n, given in (dims or {}).items()}
        known = {plain(name) for name in (*results.samples, *results.sites, *results.arguments)}
        unknown = sorted(set(self.dims) - known)
        if unknown:
            raise ValueError(f"dims names {unknown}, and the variables are {sorted(known)}")
        self.coords = dict(coords or {})

    def dataset(
        self,
        values: Arrays,
        leading: tuple[str, ...],
        rows: Mapping[str, np.ndarray] | None = None,
        *,
        events: bool = True,
        rows_first: bool = False,
    ) -> xr.Dataset:
        """Arrays by name with their dimensions: `leading`, then those of the plates, then of events if there are any.

        `rows` are the chosen ones by plate; `rows_first` is for arrays that are no sites.
        """
        named: dict[str, tuple[str, ...]] = {}
        plates: dict[str, str] = {}
        sizes = dict(zip(leading, self.results.shape, strict=False))
        rows = rows or {}
        for name, value in values.items():
            shape = value.shape[len(leading) :]
            around = self._plates(name, shape, events, rows_first, rows)
            dims = self._names(name, shape, around, events)
            plates |= {dims[i]: plate for i, plate in around.items()}
            named[name] = (*leading, *dims)
            for dim, size in zip(dims, shape, strict=True):
                if sizes.setdefault(dim, size) != size:
                    raise ValueError(
                        f"dimension {dim!r} of {name!r} has {size} entries and elsewhere {sizes[dim]}: name the "
                        "dimensions with dims="
                    )
        coords = {dim: self._coordinate(dim, size, rows.get(plates.get(dim, ""))) for dim, size in sizes.items()}
        names = {name: plain(name) + "_" * (plain(name) in sizes) for name in values}
        return xr.Dataset({names[name]: (named[name], value) for name, value in values.items()}, coords)

    def _plates(
        self, name: str, shape: tuple, events: bool, rows_first: bool, rows: Mapping[str, np.ndarray]
    ) -> dict[int, str]:
        """Plate of each dimension that is one's."""
        plates = self.results.plates
        if rows_first:  # an argument of the model: only its length tells
            fitting = [plate for plate in data_plates(self.results) if shape[:1] == (plates[plate].size,)]
            return {0: fitting[0]} if len(fitting) == 1 else {}
        if name not in self.results.sites:
            return {}
        axes = self.results.sites[name].axes(shape, None if events else 0)
        length = {plate: len(rows.get(plate, range(plates[plate].size))) for plate in axes}
        return {len(shape) + axis: plate for plate, axis in axes.items() if shape[axis] == length[plate]}

    def _names(self, name: str, shape: tuple, plates: Mapping[int, str], events: bool) -> list[str]:
        if name in BY_SITE:
            return ["site"]
        names = [plain(plates.get(i, f"{name}_dim_{i}")) for i in range(len(shape))]
        given = self.dims.get(plain(name), [])
        # A log likelihood has no event dimensions, so it takes the first of the names.
        if len(given) > len(names) and events:
            raise ValueError(f"dims[{name!r}]={given!r} has more names than the variable's shape {shape} dimensions")
        return [*given, *names[len(given) :]][: len(names)]

    def _coordinate(self, dim: str, size: int, rows: np.ndarray | None) -> np.ndarray:
        if dim == "site" and len(self.results.site_names) == size:
            return np.array([plain(name) for name in self.results.site_names])
        if dim not in self.coords:
            return np.arange(size) if rows is None else rows
        value = np.asarray(self.coords[dim])
        if rows is not None and len(value) > rows.max() and len(value) != size:
            value = value[rows]
        if value.shape != (size,):
            raise ValueError(f"coords[{dim!r}] has shape {value.shape}, and the dimension has {size} entries")
        return value
