"""What `update_batch_norm` needs on both backends: the arguments in a batch, and errors in words."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any


def check_arguments(model: Any, draw: Any, batches: Any, params: Any) -> None:
    """Raise a ValueError for arguments of another kind."""
    if not callable(model):
        raise ValueError(f"model must be callable, got {model!r}")
    for name, value in (("draw", draw), ("params", params)):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must be a dict of values by site, got {value!r}")
    if isinstance(batches, str | Mapping) or not hasattr(batches, "__iter__") or hasattr(batches, "shape"):
        raise ValueError(
            f"batches must be an iterable of batches, such as a DataLoader or [(x, y)], got {type(batches).__name__}"
        )


def with_first(batches: Iterable) -> tuple[Any, Iterator]:
    """The first batch, and all of them."""
    rest = iter(batches)
    for first in rest:
        return first, chain([first], rest)
    raise ValueError(
        f"batches is empty ({type(batches).__name__}): give the training data once, as in [(x, y)]; a generator that "
        "was used before gives nothing more"
    )


def arguments(batch: Any, kwargs: Mapping[str, Any]) -> tuple[tuple, dict]:
    """A model's arguments: a tuple or list is positional, a dict by keyword, anything else the only one."""
    if isinstance(batch, Mapping):
        return (), {**kwargs, **batch}
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,), dict(kwargs)


def number_of_rows(leaves: Iterable) -> int:
    """Rows of a batch, which weigh it: those of the first array among its leaves."""
    lengths = [len(leaf) for leaf in leaves if getattr(leaf, "shape", ())]
    if not lengths or not lengths[0]:
        raise ValueError(
            f"a batch has arrays of the lengths {lengths}: batches must give the model's arguments, with at "
            "least one row each"
        )
    return lengths[0]


def rows_of_plate(size: int, subsample_size: int | None, rows: int) -> int | None:
    """How many rows a plate has for a batch; None for a plate to leave as it is."""
    if size == rows:
        return size
    # A plate that states the number of all training data, and is given some of them.
    return min(rows, size) if subsample_size not in (None, size) else None


def check_draw(draw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a ValueError unless `draw` has one value for each latent site; `shapes` are those of the sites."""
    missing = [name for name in shapes if name not in draw]
    if missing:
        raise ValueError(
            f"draw has no values for {missing}, which the model samples: add them, or give observations in batches, as "
            f"in [(x, y)], if they are what the model predicts; draw has {list(draw)}"
        )
    for name, shape in shapes.items():
        given = tuple(draw[name].shape)
        if given != shape:
            raise ValueError(
                f"draw[{name!r}] has shape {given}, and the site has {shape}: give the values of one draw, as in "
                "{name: value[0] for name, value in draws.items()}"
            )


def check_finite(layers: Sequence[str]) -> None:
    """Raise a ValueError if there are layers with statistics that are not."""
    if layers:
        raise ValueError(
            f"the statistics of {list(layers)} are not finite: look for values in draw, params and batches that are "
            "not, or are huge; nothing was changed"
        )
