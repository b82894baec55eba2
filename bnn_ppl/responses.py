"""What `predict` asks of a model before it computes: which site it predicts, where its rows are, whose draws it needs.

A model is looked at twice, on B and on B + 1 rows: what grows by one is the axis of the rows, whatever plates it has.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from bnn_ppl.settings import check_choice

SCHEMES = ("ensemble", "stochastic", "deterministic")
GUIDE_DRAWS = 1000
RESERVED = ("chain", "draw", "row", "class")


@dataclass(frozen=True)
class Site:
    """A sample site as a look found it: its shape, events included, and the names of its plates by dimension.

    `axis` is that of the rows in `shape`, counted from the end; 0 where it has none.
    """

    name: str
    observed: bool
    shape: tuple[int, ...]
    event_dim: int
    plates: dict[int, str]
    axis: int = 0

    @property
    def dims(self) -> list[str]:
        """Names of the dimensions other than that of the rows, which comes first in all results."""
        named = {dim - self.event_dim: plate for dim, plate in self.plates.items()}
        others = [axis for axis in range(-len(self.shape), 0) if axis != self.axis]
        names = [named.get(axis, f"{self.name}_dim_{i + 1}") for i, axis in enumerate(others)]
        return [name + "_" * (name in RESERVED) for name in names]


class Look(NamedTuple):
    """What one run of a model showed: its sample sites in order, its plates' sizes, and why it failed, if it did."""

    sites: dict[str, Site]
    plate_sizes: set[int]
    error: Exception | None = None


class Draws(NamedTuple):
    """Shapes of draws by site, how many dimensions in front may be theirs, and the model's observed sites if known."""

    shapes: dict[str, tuple[int, ...]]
    leading: tuple[int, ...]
    observed: tuple[str, ...] = ()


def check_numbers(**numbers: Any) -> None:
    """Raise a ValueError unless each is an integer of at least 1, or None."""
    for name, value in numbers.items():
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if value is not None and not (whole and value >= 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_scheme(scheme: Any, num_draws: int | None, seed: Any) -> None:
    """Raise a ValueError for an unknown scheme, and for what does not go with one draw."""
    check_choice("scheme", scheme, SCHEMES)
    if scheme != "stochastic":
        return
    if num_draws not in (None, 1):
        raise ValueError(
            f"num_draws={num_draws} with scheme='stochastic', which predicts with one draw: leave num_draws out, or "
            "take scheme='ensemble' to average over several"
        )
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0 for scheme='stochastic', got {seed!r}")


def check_model(model: Any, source: str) -> None:
    """Raise a ValueError unless `model` is a callable."""
    if not callable(model):
        raise ValueError(f"model={model!r}: {source} brings no model, so give the one that it belongs to as model=")


def check_source(source: Any, host: str, svi: type) -> None:
    """Raise a TypeError for what is neither an MCMC of the host, nor draws by site, nor a guide; `svi` is its SVI."""
    if isinstance(source, svi):  # Pyro's is a callable, as a guide is
        own = [f"svi.{name}(...), " for name in ("averaged_guide", "snapshots") if hasattr(source, name)]
        raise TypeError(
            f"source is an SVI ({type(source).__name__}), and it is its guide that has draws: give {''.join(own)}"
            f"{'or ' * bool(own)}the guide that it trained, svi.guide"
        )
    if not callable(source):
        raise TypeError(
            f"source must be a {host}.infer.MCMC after its run, a dict of draws by site, or a guide, got "
            f"{type(source).__module__}.{type(source).__name__}"
        )


def check_draws(draws: Mapping[str, Any]) -> None:
    """Raise a TypeError for a dict of something else than arrays, such as the groups of an InferenceData."""
    for name, value in draws.items():
        if isinstance(value, Mapping):
            raise TypeError(
                f"source has a {type(value).__name__} under {name!r} instead of draws: give arrays by site, such as "
                "dict(tree['posterior'])"
            )


def check_params(params: Any, remedy: str) -> None:
    """Raise a TypeError for params that are no dict."""
    if params is not None and not isinstance(params, Mapping):
        raise TypeError(f"params must be a dict of values by param site, got {type(params).__name__}: {remedy}")


def check_trained(guide: Any) -> None:
    """Raise a ValueError for an automatic guide that has never run."""
    if getattr(guide, "prototype_trace", True) is None:
        raise ValueError(f"the guide {type(guide).__name__} has not been trained: run SVI with it first")


def takes_medians(guide: Any, scheme: str, num_draws: int | None) -> bool:
    """Whether a guide is predicted by its medians; a ValueError if a number of draws is given then."""
    if scheme != "deterministic" or not hasattr(guide, "median"):
        return False
    if num_draws is not None:
        raise ValueError(
            f"num_draws={num_draws} with scheme='deterministic', which takes the median of the guide "
            f"{type(guide).__name__} and no draws: leave num_draws out"
        )
    return True


def check_medians(guide: Any, medians: Mapping[str, Any], latent: Iterable[str]) -> None:
    """Raise a ValueError for latent sites of which a guide knows no median."""
    missing = [name for name in latent if name not in medians]
    if missing:
        raise ValueError(
            f"scheme='deterministic' takes the median of the guide {type(guide).__name__}, which has none of the sites "
            f"{missing}: give lambda *args, **kwargs: guide(*args, **kwargs) in its place, for the means of its draws"
        )


def no_moments(site: str, distribution: str) -> str:
    """Error text for a distribution of which the mean or the variance is not known."""
    return (
        f"site {site!r} has the distribution {distribution}, without a mean and variance in closed form: give a model= "
        "with another one, or draw from it with to_arviz(mcmc, posterior_predictive=True) or the host's Predictive"
    )


def number_of_rows(lengths: Sequence[int]) -> int:
    """Rows of the held-out data, from the lengths of the model's array arguments: that of the first one.

    Raises
    ------
    ValueError
        If there is no array, or no row in it.
    """
    if not lengths or not lengths[0]:
        lists = "" if lengths else "; lists are no arrays, so make arrays of them first"
        raise ValueError(
            f"the model's array arguments have the lengths {list(lengths)}: give the arguments of the model with at "
            f"least one row to predict, as in predict(mcmc, x_test, y_test){lists}"
        )
    return lengths[0]


def inspect_rows(
    look: Callable[[int, int | None], Look], rows: int, lengths: Sequence[int], drawn: Mapping[str, Any]
) -> tuple[dict[str, Site], int | None]:
    """Sites of the model with their axes of rows, and the constant size of its data plate, if it has one.

    Parameters
    ----------
    look
        Runs the model on so many rows; plates of the second number, if it is one, take as many.
    rows
        Of the first look.
    lengths
        Of the model's array arguments.
    drawn
        Sites with draws, whose axes do not matter.

    Raises
    ------
    ValueError
        If the model fails and its arguments have different lengths.
    Exception
        The model's own, if it fails otherwise.
    """
    first = look(rows, None)
    without_rows, failure = None, first.error
    # A plate of constant size, such as the number of training data, is tried as that of the rows: the largest first.
    for constant in (None, *sorted(first.plate_sizes, reverse=True)):
        small = first if constant is None else look(rows, constant)
        large = look(rows + 1, constant)
        if small.error or large.error:
            failure = failure or small.error or large.error
            continue
        sites = {name: replace(site, axis=_growing(site, large.sites.get(name))) for name, site in small.sites.items()}
        if any(site.axis and (site.observed or name not in drawn) for name, site in sites.items()):
            return sites, constant
        without_rows = without_rows or sites
    if without_rows is not None:
        return without_rows, None
    if len(set(lengths)) > 1:
        raise ValueError(
            f"the model fails on {rows} rows. Its array arguments have the lengths {list(lengths)}, and those as long "
            "as the first are cut into rows: give as many rows of x as of y"
        ) from failure
    raise failure  # type: ignore[misc]


def _growing(small: Site, large: Site | None) -> int:
    """The axis, counted from the end, that grew from one look to the other; 0 if none did."""
    if large is None or len(small.shape) != len(large.shape):
        return 0
    grown = [i for i in range(-len(small.shape), 0) if small.shape[i] != large.shape[i]]
    return grown[0] if len(grown) == 1 else 0


def choose_response(sites: Mapping[str, Site], draws: Draws, site: str | None) -> Site:
    """The site to predict.

    Raises
    ------
    ValueError
        If there is none, if `site` does not say which of several, or if all its rows have one density.
    """
    without_draws = [s for s in sites.values() if s.observed or s.name not in draws.shapes]
    if site is None:
        known = draws.observed
        found = [s for s in without_draws if s.axis and (s.observed or not known or s.name in known)]
    else:
        found = [s for s in without_draws if s.name == site]
        if not found:
            raise ValueError(
                f"site={site!r} is no observed site of the model: choose from {[s.name for s in without_draws]}"
            )
    if len(found) > 1:
        raise ValueError(f"the model has the observed sites {[s.name for s in found]}: name one of them with site=")
    if not found or not found[0].axis:
        raise ValueError(
            "the model has no observed site with one value per row of its arguments; its sample sites are "
            f"{list(sites)}: give it the site to predict, sample('y', ..., obs=y), in a plate over the rows"
        )
    if found[0].axis >= -found[0].event_dim:
        raise ValueError(
            f"site {found[0].name!r} of shape {found[0].shape} has its rows among its {found[0].event_dim} event "
            "dimensions, and so one density for all of them: put the rows in a plate instead of to_event"
        )
    return found[0]


def fit_draws(sites: Mapping[str, Site], draws: Draws, response: Site) -> tuple[tuple[int, ...], list[str], list[str]]:
    """Numbers of draws, or of chains and draws; the latent sites before the response; other random sites before it.

    Raises
    ------
    ValueError
        If the draws are not of this model, or differ in number.
    """
    before = list(sites.values())[: list(sites).index(response.name)]
    latent = [s for s in before if not s.observed]
    missing = [s.name for s in latent if s.name not in draws.shapes and not s.axis]
    if missing:
        raise ValueError(
            f"the latent sites {missing} of the model have no draws; there are draws of {list(draws.shapes)}: give "
            "draws of this model, all sites kept"
        )
    counts = {s.name: _count(s, draws) for s in latent if s.name in draws.shapes}
    if not counts:
        raise ValueError(f"no draw enters the model before site {response.name!r}: there is nothing to average over")
    if len(set(counts.values())) > 1:
        raise ValueError(f"the draws differ in number from site to site, {counts}: give as many of each")
    return next(iter(counts.values())), list(counts), [s.name for s in latent if s.name not in counts]


def _count(site: Site, draws: Draws) -> tuple[int, ...]:
    if site.axis:
        raise ValueError(
            f"latent site {site.name!r} has a value for each row of the data, and held-out rows have no draws of it: "
            "give a model= without it, or with its expectation in its place"
        )
    shape = draws.shapes[site.name]
    fitting = [n for n in draws.leading if shape[n:] == site.shape and len(shape) == n + len(site.shape)]
    if not fitting:
        raise ValueError(
            f"the draws of site {site.name!r} have the shape {shape}, and the model's site has {site.shape}: give "
            "draws of this model, of shape (draws, ...) or (chains, draws, ...)"
        )
    return shape[: fitting[0]]


def check_settled(response: str, runs: Sequence[Mapping[str, np.ndarray]], others: Sequence[str]) -> None:
    """Raise a ValueError for predictions that differ between two runs with the same draws."""
    if all(np.allclose(runs[0][name], runs[1][name], rtol=1e-4, equal_nan=True) for name in runs[0]):
        return
    cause = "the model draws random numbers of its own, as dropout does: switch that off (module.eval())"
    if others:
        cause = f"it depends on {list(others)}, which have neither draws nor data: give their data, or draws"
    raise ValueError(f"site {response!r} has another distribution in a second run with the same draw, for {cause}")


def choose_draws(counts: tuple[int, ...], num_draws: int | None, scheme: str, seed: int) -> tuple[np.ndarray, ...]:
    """Indices, of chains and draws or of draws alone, shapes (chosen,): all, or some of each chain, evenly spaced.

    The scheme "stochastic" chooses one of all chains' draws at random by the seed.

    Raises
    ------
    ValueError
        If there are none, or not as many.
    """
    total = counts[-1]
    if 0 in counts:
        raise ValueError(f"there are no draws: their shape, chains first, is {counts}")
    if num_draws is not None and num_draws > total:
        raise ValueError(f"num_draws={num_draws}, and there are {total} draws in a chain: give at most as many")
    if scheme == "stochastic":
        return np.unravel_index(np.random.default_rng(seed).integers(math.prod(counts), size=1), counts)
    chosen = np.arange(num_draws or total) * total // (num_draws or total)
    grid = np.meshgrid(*map(np.arange, counts[:-1]), chosen, indexing="ij")
    return tuple(axis.ravel() for axis in grid)
