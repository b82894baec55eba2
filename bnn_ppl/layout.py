"""What a model has to be to be sampled: its plates, and errors in words, shared by both backends."""

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnn_ppl.settings import KernelSettings


def check_target(model: Any, potential_fn: Any, settings: KernelSettings) -> None:
    """Raise a ValueError unless exactly one of `model` and `potential_fn` is a callable, and only a model has rows."""
    if (model is None) == (potential_fn is None):
        given = "neither" if model is None else "both"
        raise ValueError(
            f"give exactly one of model and potential_fn, got {given}: model is a callable with sample "
            "statements, potential_fn a function of the unconstrained values"
        )
    name, value = ("model", model) if potential_fn is None else ("potential_fn", potential_fn)
    if not callable(value):
        raise ValueError(f"{name} must be callable, got {value!r}")
    if model is None and settings.batch_size is not None:
        raise ValueError(
            f"batch_size={settings.batch_size!r} needs a model with a data plate; potential_fn has no rows"
        )
    if model is None and settings.control_variate is not None:
        raise ValueError("control_variate needs a model with a data plate; potential_fn has no rows")
    if model is None and settings.likelihood_temperature != 1:
        raise ValueError(
            f"likelihood_temperature={settings.likelihood_temperature!r} needs a model, which tells the likelihood "
            "from the prior: divide the likelihood inside potential_fn"
        )


@dataclass(frozen=True)
class Plate:
    """A data plate as found in a model: `batch_size` rows of `size`, inside it some observed sites or none."""

    name: str
    size: int
    batch_size: int
    observes: bool = False
    holds_latents: bool = False

    @property
    def subsampled(self) -> bool:
        """Whether a minibatch has fewer rows than the plate."""
        return self.batch_size < self.size


def resolve_batch_size(plates: Mapping[str, Plate], batch_size: int | Mapping[str, int] | None) -> dict[str, int]:
    """Rows of a minibatch by plate, for the full-data plates that the kernel's `batch_size` cuts.

    Raises
    ------
    ValueError
        If the plate is unknown, smaller than the batch, or has a subsample_size of its own, or if an integer
        could mean several plates.
    """
    if batch_size is None:
        return {}
    if not isinstance(batch_size, Mapping):
        candidates = [p.name for p in plates.values() if p.observes and not p.subsampled and not p.holds_latents]
        own = [p for p in plates.values() if p.observes and p.subsampled]
        if not candidates and own:
            raise ValueError(
                f"batch_size={batch_size} for plate {own[0].name!r}, which has subsample_size={own[0].batch_size} "
                "already: give one of the two"
            )
        if len(candidates) != 1:
            found = f"the candidates {candidates}" if candidates else "none"
            raise ValueError(
                f"batch_size={batch_size} needs exactly one full-data plate with observations and found {found}: "
                "put the observations in a data plate without subsample_size, or give a dict by plate name"
            )
        batch_size = {candidates[0]: int(batch_size)}
    for name, rows in batch_size.items():
        if name not in plates:
            raise ValueError(f"batch_size names {name!r}, but the model's plates are {sorted(plates)}")
        plate = plates[name]
        if plate.subsampled:
            raise ValueError(
                f"batch_size={rows} for plate {name!r}, which has subsample_size={plate.batch_size} already: "
                "give one of the two"
            )
        if rows > plate.size:
            raise ValueError(f"batch_size={rows} is larger than plate {name!r} of {plate.size} rows")
    return {name: int(rows) for name, rows in batch_size.items()}


def only_plate(subsampled: Mapping[str, Plate]) -> Plate:
    """The plate of which minibatches take a part, for control variates.

    Raises
    ------
    ValueError
        Unless there is exactly one.
    """
    if len(subsampled) != 1:
        raise ValueError(
            "control_variate needs exactly one plate of which minibatches take a part, and found "
            f"{sorted(subsampled)}: leave control_variate out, or subsample one plate"
        )
    return next(iter(subsampled.values()))


def check_centre(centre: Any, given: Mapping[str, tuple[int, ...]], needed: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a ValueError unless a centre has a value of the right shape for each latent site, unconstrained."""
    if given != needed:
        raise ValueError(
            f"control_variate={sorted(centre)} gives sites of the unconstrained shapes {given}, and the model has "
            f"{needed}: give one value for each latent site, in the user's coordinates, such as an optimiser's result"
        )


def check_observation(name: str, value: Sequence[int], batch: Sequence[int], event: Sequence[int]) -> None:
    """Raise a ValueError for observations that do not fit their distribution, or count more than once by broadcasting.

    Parameters
    ----------
    name
        The observed site.
    value
        Shape of the observations; one number may stand for all.
    batch, event
        Shapes of their distribution.
    """
    if not value:
        return
    value, batch, event = tuple(value), tuple(batch), tuple(event)
    own = value[: len(value) - len(event)]
    try:
        whole = np.broadcast_shapes(own, batch)
    except ValueError:
        whole = None
    if whole is None or value[len(own) :] != event:
        raise ValueError(
            f"observed site {name!r} has values of shape {value}, and its distribution has the batch shape {batch} and "
            f"the event shape {event}: give values of shape {batch + event}; a Categorical takes class numbers, a "
            "OneHotCategorical rows with a single 1"
        )
    if math.prod(whole) > math.prod(own):
        raise ValueError(
            f"observed site {name!r} has values of shape {value}, but its distribution has the batch shape "
            f"{batch}, so that each value would be counted {math.prod(whole) // max(math.prod(own), 1)} times: "
            "give both the same shape, for instance by squeezing the network's output, mean[..., 0]"
        )


def check_start_sites(init_strategy: Any, sites: Collection[str]) -> None:
    """Raise a ValueError for start values of sites that the model lacks; strategies are not looked at."""
    unknown = sorted(set(init_strategy) - set(sites)) if isinstance(init_strategy, Mapping) else []
    if unknown:
        raise ValueError(f"init_strategy has values for {unknown}, and the latent sites are {sorted(sites)}")


def check_start_value(name: str, given: tuple[int, ...], needed: tuple[int, ...]) -> None:
    """Raise a ValueError for a start value of the wrong shape."""
    if tuple(given) != tuple(needed):
        raise ValueError(
            f"init_strategy has a value of shape {tuple(given)} for site {name!r} of shape {tuple(needed)}: give one "
            "value of the site, such as one draw, in the user's coordinates"
        )


STREAM_FAILURE = (
    "the model fails on the first batch of minibatches=: it gets one batch, model(*batch), and a plate must state the "
    'rows of all batches, plate("data", N, subsample_size=len(x)), with the batch taken as it is inside'
)


def bypass_message(name: str, plate: str, what: str) -> str:
    """Error text for an observed site whose data do not follow the rows of its plate."""
    return (
        f"{what} of observed site {name!r} are the same for different rows of plate {plate!r}, so the data bypass it: "
        "take both inputs and observations by the plate's indices, x[idx] and y[idx], or by subsample(...) inside it"
    )


def beyond_message(plates: Mapping[str, Plate], detail: str) -> str:
    """Error text for indices of plates beyond the end of the data."""
    sizes = " and ".join(f"plate {plate.name!r} has {plate.size} rows" for plate in plates.values())
    return (
        f"{sizes}, and the model takes rows that its data do not have ({detail}): give as many rows of each array, x "
        "and y alike"
    )


def sources(values: np.ndarray, size: int, arrays: Iterable[Any], to_numpy: Callable = np.asarray) -> list[Any]:
    """Arguments that have these observations, not all of them equal, as the last ones of `size` rows."""
    if not values.ndim:  # one number for all rows
        return []
    first = size - len(values)
    if first < 0 or not (values != values[:1]).any():
        return []
    fitting = [array for array in arrays if len(array) >= size and array.shape[1:] == values.shape[1:]]
    return [array for array in fitting if np.array_equal(to_numpy(array[first:size]), values)]


def warn_unused_rows(name: str, size: int, rows: int) -> None:
    """Tell the user of observations with more rows than their plate has."""
    if rows > size:
        warnings.warn(
            f"the data of observed site {name!r} have {rows} rows and its plate has {size}, so that the rest is never "
            "seen: give as many rows of x as of y",
            UserWarning,
            stacklevel=4,
        )


def check_classes(name: str, values: np.ndarray, classes: int) -> None:
    """Raise a ValueError for observations that are no class numbers."""
    bad = np.argwhere((values < 0) | (values >= classes) | (values != np.floor(values)))
    if len(bad):
        raise ValueError(
            f"observed site {name!r} is {values[tuple(bad[0])]} at row {bad[0][0]}, and its classes are 0 to "
            f"{classes - 1}: give class numbers as the model has them, and mask what is missing (.mask(known), with "
            "class 0 in its place)"
        )


def check_one_hot(name: str, values: np.ndarray) -> None:
    """Raise a ValueError for observations, classes last, that do not have a single 1 among zeros."""
    bad = np.argwhere(((values != 0) & (values != 1)).any(-1) | (values.sum(-1) != 1))
    if len(bad):
        raise ValueError(
            f"observed site {name!r} is {values[tuple(bad[0])]} at row {bad[0][0]}, and its distribution is over rows "
            "with a single 1: give such rows, or class numbers to a Categorical"
        )


def check_dtype_of_classes(name: str, dtype: Any, classes: int) -> None:
    """Raise a ValueError for class numbers that are no integers, where the host takes them as indices."""
    if np.dtype(dtype).kind not in "biu":
        raise ValueError(
            f"observed site {name!r} has values of type {np.dtype(dtype).name}, and its classes are the integers 0 to "
            f"{classes - 1}: give integers, such as y.astype(int)"
        )


def warn_data(shape: tuple[int, ...]) -> None:
    """Tell the user that an argument of the model, of this shape, is not finite everywhere."""
    warnings.warn(
        f"an argument of the model, of shape {shape}, has NaN or infinite values: unless the model masks them, the "
        "chain diverges whenever a minibatch meets them",
        UserWarning,
        stacklevel=4,
    )
