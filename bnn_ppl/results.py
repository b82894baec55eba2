"""What a finished MCMC or a trained SVI holds, in the shape that `bnn_ppl.export` reads for both backends."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bnn_ppl.layout import Plate


@dataclass(frozen=True)
class Site:
    """Kind of a site (latent, observed, factor, deterministic) and the plates around it, with their dimensions."""

    kind: str
    plates: dict[str, int]
    event_dim: int

    def axes(self, shape: tuple[int, ...], event_dim: int | None = None) -> dict[str, int]:
        """Axis, counted from the end, of each plate in an array of this shape."""
        inner = self.event_dim if event_dim is None else event_dim
        return {plate: dim - inner for plate, dim in self.plates.items() if len(shape) >= inner - dim}


@dataclass(frozen=True)
class Guide:
    """A trained guide, whose draws are made when they are asked for, since those of networks are large.

    `sample` takes names of sites and gives draws and statistics (1, draw) of them; `latents` takes `inputs` and the
    number of a draw, and gives its latent sites. Averages have the steps and weights of their `snapshots`.
    """

    names: list[str]
    sample: Callable
    latents: Callable
    inputs: Any = field(repr=False)
    elbo: np.ndarray | None = field(repr=False)
    snapshots: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class Results:
    """Draws (chain, draw, ...) and statistics (chain, draw) by name, and all that replays the model."""

    samples: dict[str, Any] = field(repr=False)
    statistics: dict[str, np.ndarray] = field(repr=False)
    shape: tuple[int, int]
    plates: dict[str, Plate]
    sites: dict[str, Site]
    settings: dict[str, Any]
    libraries: dict[str, str]
    model: Callable | None
    held: dict[str, Any] = field(repr=False)
    args: tuple = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)
    arguments: dict[str, Any] = field(repr=False)
    site_names: list[str]
    guide: Guide | None = None

    @property
    def latents(self) -> dict[str, Any]:
        """Draws of the latent sites, as far as they were kept."""
        return {n: self.samples[n] for n, site in self.sites.items() if site.kind == "latent" and n in self.samples}


def data_plates(results: Results) -> list[str]:
    """Plates around observed sites and around no latent ones."""
    observed, latent = (
        {plate for site in results.sites.values() if site.kind == kind for plate in site.plates}
        for kind in ("observed", "latent")
    )
    return [plate for plate in results.plates if plate in observed - latent]


def missing_latents(results: Results) -> list[str]:
    """Latent sites of which no draws were kept; a guide can draw all again."""
    if results.guide is not None:
        return []
    return [n for n, site in results.sites.items() if site.kind == "latent" and n not in results.samples]


def bound_arguments(model: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by the names of the parameters; none where the signature cannot be read."""
    named: dict[str, Any] = {}
    try:
        signature = inspect.signature(model)
        bound = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return named
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{i}": item for i, item in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    return named
