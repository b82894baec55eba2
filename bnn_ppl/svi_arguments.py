"""What `bnn_ppl.to_arviz` asks of an SVI before it draws from its guide: shared by both backends."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from bnn_ppl.layout import Plate, sources, warn_unused_rows
from bnn_ppl.local_noise import UNMARKED
from bnn_ppl.results import Site
from bnn_ppl.schedules import check_count

NUM_SAMPLES = 1000
_BATCH_BYTES = 2**26
ValueCheck = Callable[[str, np.ndarray], None]  # of an observed site: name and values


@dataclass(frozen=True)
class SVIArguments:
    """Arguments of `to_arviz` that chains do not have, as they were given; `seed` is that of the draws."""

    svi_result: Any
    model_args: Any
    model_kwargs: Any
    num_samples: Any
    losses: Any
    seed: int

    @property
    def args(self) -> tuple:
        """Positional arguments of model and guide."""
        return tuple(self.model_args or ())

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of model and guide."""
        return dict(self.model_kwargs or {})

    @property
    def total(self) -> int:
        """Number of draws."""
        return NUM_SAMPLES if self.num_samples is None else int(self.num_samples)

    @property
    def elbo(self) -> np.ndarray | None:
        """Minus the losses."""
        return None if self.losses is None else -np.asarray(self.losses, float)


def refuse_for_chains(given: SVIArguments) -> None:
    """Raise a ValueError for an argument of an SVI that came with an MCMC."""
    for field in fields(given):
        value = getattr(given, field.name)
        if field.name != "seed" and value is not None:
            raise ValueError(
                f"{field.name} of type {type(value).__name__} is for an SVI, and source is an MCMC, which brings its "
                "own draws and data: leave it out"
            )


def check_given(given: SVIArguments, noise_batches: Any) -> None:
    """Raise a TypeError or ValueError for what no SVI takes."""
    if noise_batches is not None:
        raise ValueError(f"noise_batches={noise_batches!r} is for an MCMC, and source is an SVI: leave it out")
    if not isinstance(given.model_args, tuple | list | None):
        raise TypeError(
            f"model_args must be a tuple of the model's positional arguments, got {type(given.model_args).__name__}: "
            "for one argument write model_args=(x,)"
        )
    if not isinstance(given.model_kwargs, Mapping | None):
        raise TypeError(
            "model_kwargs must be a dict of the model's keyword arguments, got " + type(given.model_kwargs).__name__
        )
    if given.num_samples is not None:
        check_count("num_samples", given.num_samples)
    if given.losses is not None:
        try:
            shape = np.asarray(given.losses, float).shape
        except (TypeError, ValueError) as error:
            raise TypeError(f"losses must be a list of numbers, one a step: {error}") from error
        if len(shape) != 1 or shape == (0,):
            raise ValueError(f"losses must be a list of one or more numbers, one a step, got the shape {shape}")


def check_fits(model: Callable, given: SVIArguments, kwargs: Mapping[str, Any]) -> None:
    """Raise a ValueError for arguments that are not those of the model."""
    try:
        signature = inspect.signature(model)
    except (TypeError, ValueError):  # some callables have none to read
        return
    try:
        signature.bind(*given.args, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"model_args of {len(given.args)} and model_kwargs={list(given.kwargs)} do not fit the model's arguments "
            f"{signature} ({error}): pass those of the training, on all rows of the data"
        ) from error


def check_no_number(given: SVIArguments) -> None:
    """Raise a ValueError for a number of draws where there are snapshots."""
    if given.num_samples is not None:
        raise ValueError(
            f"num_samples={given.num_samples} with an SVI of snapshots, which are the draws themselves, all of them: "
            "leave it out"
        )


def check_params(guide: Any, missing: Sequence[str], remedy: str) -> None:
    """Raise a ValueError for param sites of the guide without a value."""
    if missing:
        raise ValueError(
            f"the guide {_name(guide)} has not been trained: its params {list(missing)} have no values: {remedy}"
        )


def check_sites(sites: Mapping[str, Site], drawn: Mapping[str, Any], plates: Mapping[str, Plate]) -> None:
    """Raise a ValueError for latent sites of the model that the guide does not draw, or not for all rows.

    `drawn` are sites of the guide with the names of their plates.
    """
    latent = {name: site for name, site in sites.items() if site.kind == "latent"}
    missing = [name for name in latent if name not in drawn]
    if missing:
        raise ValueError(
            f"the guide gives no draws of the model's latent sites {missing}; it has {list(drawn)}. If such a site is "
            "meant to be observed, its data were None: pass them in model_args; else give it a place in the guide"
        )
    for name, site in latent.items():
        for plate in (*site.plates, *drawn[name]):
            if plate in plates and plates[plate].subsampled:
                raise ValueError(
                    f"latent site {name!r} lies in the subsampled plate {plate!r}, and a draw of the guide has only "
                    f"{plates[plate].batch_size} of its {plates[plate].size} rows: leave subsample_size out of model "
                    "and guide, or draw this site with the host's Predictive"
                )


def is_streamed(look: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]], plates: Mapping[str, Plate]) -> bool:
    """Whether observations in subsampled plates are the same whatever rows the plates take: batches were passed in.

    `look` gives these observations for some rows.
    """
    subsampled = [plate for plate in plates.values() if plate.subsampled]
    if not subsampled:
        return False
    first = look({p.name: np.arange(p.batch_size) for p in subsampled})
    last = look({p.name: np.arange(p.size - p.batch_size, p.size) for p in subsampled})
    if not first or any(not np.array_equal(first[name], last[name], equal_nan=True) for name in first):
        return False
    try:  # equal data would look so too
        more = look({p.name: np.arange(p.batch_size + 1) for p in subsampled})
    except Exception:
        return True
    return all(more[name].shape == first[name].shape for name in first)


def check_values(value_checks: Mapping[str, ValueCheck], values: Mapping[str, np.ndarray]) -> None:
    """Raise a ValueError for observations that their distribution cannot have."""
    for name, check in value_checks.items():
        check(name, np.atleast_1d(values[name]))


def settings_of(guide: Any, loss: Any) -> dict[str, Any]:
    """Names of the guide and of the loss, for the attributes of the draws."""
    loss = getattr(loss, "__self__", loss)  # Pyro keeps the method
    return {"guide": _name(guide), "loss": _name(loss)}


def _name(x: Any) -> str:
    x = getattr(x, UNMARKED, x)  # the user's guide in that of local_reparameterization
    return getattr(x, "__name__", type(x).__name__)


def _inside_subsampled(site: Site, plates: Mapping[str, Plate]) -> bool:
    return any(plate in plates and plates[plate].subsampled for plate in site.plates)


def observed_inside(sites: Mapping[str, Site], plates: Mapping[str, Plate]) -> list[str]:
    """Observed sites inside subsampled plates."""
    return [n for n, site in sites.items() if site.kind == "observed" and _inside_subsampled(site, plates)]


def warn_longer(
    data: Mapping[str, np.ndarray], sites: Mapping[str, Site], plates: Mapping[str, Plate], arrays: Sequence[np.ndarray]
) -> None:
    """Warn of arguments with more rows than the subsampled plate of the observations that are taken from them."""
    for name in observed_inside(sites, plates):
        values = data[name]
        longer = [a.astype(values.dtype) for a in arrays if a.ndim and values.ndim and len(a) > len(values)]
        for array in sources(values, len(values), longer):
            warn_unused_rows(name, len(values), len(array))


def names_to_draw(sites: Mapping[str, Site], plates: Mapping[str, Plate]) -> list[str]:
    """Sites of the group `posterior`: those of deterministic ones that have all rows."""
    return [
        name
        for name, site in sites.items()
        if site.kind == "latent" or (site.kind == "deterministic" and not _inside_subsampled(site, plates))
    ]


def elbo_name(plates: Mapping[str, Plate]) -> str:
    """Name of the one-draw estimates, which tells those on a minibatch."""
    return "elbo_minibatch" if any(plate.subsampled for plate in plates.values()) else "elbo"


def draws_at_once(bytes_of_one: int, total: int) -> int:
    """Draws in a batch, so that what is kept of them fits beside the model."""
    return max(1, min(total, _BATCH_BYTES // max(bytes_of_one, 1)))
