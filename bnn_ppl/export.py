"""Draws of a finished MCMC, of either host, for ArviZ.

The draws, their statistics and the data are gathered in a plain ``xarray.DataTree``, which ArviZ 1.x works with;
only at the end it becomes the ``InferenceData`` of ArviZ 0.x. Log likelihoods and predictions visit the data in
chunks of exactly as many rows as a minibatch has, the last one filled up and trimmed, because a model with a
subsampled plate sees that many rows and no others.
"""

import itertools
import json
import numbers
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from typing import Any

import numpy as np
import xarray as xr

from bnn_ppl.labels import Arrays, Labels, data_plates, plain
from bnn_ppl.layout import Plate
from bnn_ppl.schedules import Cyclical, check_count

_SAMPLE_DIMS = ("chain", "draw")


def to_arviz(
    mcmc: Any,
    *,
    var_names: str | Sequence[str] | None = None,
    log_likelihood: bool = False,
    posterior_predictive: bool = False,
    constant_data: bool = True,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    rows: Any = None,
    batch_size: int | Mapping[str, int] | None = None,
    noise_batches: int | None = None,
    seed: int = 0,
) -> Any:
    """Draws, statistics and data of a finished MCMC, as what the installed ArviZ works with.

    Parameters
    ----------
    mcmc
        ``numpyro.infer.MCMC`` or ``pyro.infer.MCMC`` after ``run``, with a kernel of this library or of the host.
    var_names
        Sites for the group `posterior`, by default all: a name, or a list of them. ``"~name"`` leaves one out; an
        empty list leaves out the group.
    log_likelihood
        Whether to add the log likelihood of each row under each draw.
    posterior_predictive
        Whether to sample the observed sites anew under each draw, each given the others sampled before it.
    constant_data
        Whether to add the model's array arguments that are not observations.
    dims
        Names of the dimensions, after chain and draw, by variable. By default those of the plates, then
        ``"<variable>_dim_0"`` and so on.
    coords
        Coordinate values by dimension. By default 0, ..., N - 1 for a plate of N rows.
    rows
        Rows of the data for the groups `log_likelihood` and `posterior_predictive`: indices, shape (n,), for a
        model with one data plate, or a dict by plate name. By default all.
    batch_size
        Rows in a chunk of these two groups: an int for each subsampled plate, or a dict by plate name. By default
        as many as in a minibatch; more are faster and take more memory.
    noise_batches
        Minibatches on which to measure the gradient noise at the last draw of each chain, at least 2, for
        `bnn_ppl.diagnostics.bias_certificate`; by default it is not measured.
    seed
        Seed of the predictions and of these minibatches. The hosts' own random states are left alone.

    Returns
    -------
    arviz.InferenceData or xarray.DataTree
        With ArviZ 0.x the first, with 1.x the second. Groups: `posterior`, shapes (chain, draw, ...);
        `sample_stats`, shapes (chain, draw), where the statistic `lp_minibatch` is named `lp` if each "minibatch"
        was the full data, and with `noise_batches` `gradient_noise` (chain, site), the variance of a component of the
        minibatch gradient (sum scale) over minibatches, averaged over the coordinates of the site, whose number is
        `site_size` (site); `observed_data` and `constant_data`, all rows; and on request `log_likelihood` (chain,
        draw, rows) and `posterior_predictive` (chain, draw, rows, ...). The kernel's settings are in the
        attributes of the first two.

    Raises
    ------
    TypeError
        If `mcmc` is no MCMC of NumPyro or Pyro.
    ValueError
        If it has not run, or an argument does not fit the model; the message names both.

    Warns
    -----
    UserWarning
        If draws diverged, which NumPyro cannot tell while it samples; if the noise of the minibatch gradients dominates
        the injected noise; or where draws do not fill the last cycle of `bnn_ppl.schedules.Cyclical`.

    Notes
    -----
    A model without subsampled plates is evaluated on all rows at once. An argument of the model with the name of
    a dimension gets an underscore at its end. Slashes in names become dots: ``"nn/Dense_0.kernel"`` of a Flax module
    is ``"nn.Dense_0.kernel"``, for a DataTree takes slashes for paths; `var_names` and `dims` take either.

    Examples
    --------
    >>> tree = to_arviz(mcmc, log_likelihood=True)
    >>> az.summary(tree, var_names=["noise_scale"])
    >>> az.loo(tree)
    """
    side = _side(mcmc)
    results = side.read(mcmc)
    names = _choose(var_names, list(results.samples) + side.deterministics(results))
    if (log_likelihood or posterior_predictive) and results.model is None:
        raise ValueError(
            f"log_likelihood={log_likelihood}, posterior_predictive={posterior_predictive}: a chain of a potential_fn, "
            "or of minibatches=, has no full data; leave both False, or call predict(mcmc, x, y)"
        )
    if (rows is not None or batch_size is not None) and not (log_likelihood or posterior_predictive):
        raise ValueError(
            f"rows={rows!r}, batch_size={batch_size!r} have no effect without log_likelihood=True or "
            "posterior_predictive=True: leave them out"
        )
    _check_noise_batches(noise_batches, results)
    plan = _Plan(results, _check_rows(rows, results), _chunk_sizes(batch_size, results.plates))
    labels = Labels(results, dims, coords)

    posterior = side.posterior(results, names)
    groups = {
        "posterior": labels.dataset(posterior, _SAMPLE_DIMS),
        "sample_stats": labels.dataset(results.statistics, _SAMPLE_DIMS),
    }
    if noise_batches is not None:
        noise, sizes = side.gradient_noise(mcmc, noise_batches, seed)
        groups["sample_stats"]["gradient_noise"] = ("chain", "site"), noise
        groups["sample_stats"]["site_size"] = ("site",), sizes
    for name in ("posterior", "sample_stats"):
        groups[name].attrs |= _attributes(results.settings)
    # A host's factor has a log density but no values.
    observed = [name for name, site in results.sites.items() if site.kind == "observed"]
    scored = [name for name, site in results.sites.items() if site.kind in ("observed", "factor")]
    if results.model is not None:
        every_row = _Plan(results, {}, _chunk_sizes(None, results.plates))
        data = every_row.gather(observed, side.evaluator(results, "observed", observed, seed), None)
        groups["observed_data"] = labels.dataset(data, ())
        if constant_data:
            constants = _constants(side.arguments(results), data)
            groups["constant_data"] = labels.dataset(constants, (), rows_first=True)
    if log_likelihood:
        values = plan.gather(scored, side.evaluator(results, "log_likelihood", scored, seed), 0)
        groups["log_likelihood"] = labels.dataset(values, _SAMPLE_DIMS, plan.rows, events=False)
    if posterior_predictive:
        values = plan.gather(observed, side.evaluator(results, "posterior_predictive", observed, seed), None)
        groups["posterior_predictive"] = labels.dataset(values, _SAMPLE_DIMS, plan.rows)

    _warn_unfilled_cycle(results)
    _warn_diverging(results)
    _warn_hot(results)
    groups = {name: group for name, group in groups.items() if group.data_vars}
    for group in groups.values():
        group.attrs |= results.libraries
    return _for_arviz(xr.DataTree.from_dict(groups))


def _check_noise_batches(count: int | None, results: Any) -> None:
    if count is None:
        return
    check_count("noise_batches", count)
    if count == 1:
        raise ValueError("noise_batches must be at least 2, to see the noise between them, got 1")
    subsampled = any(plate.subsampled for plate in results.plates.values())
    if results.model is None or "steps_per_draw" not in results.settings or not subsampled:
        raise ValueError(
            f"noise_batches={count!r} needs a kernel of this library with data in memory and a subsampled plate: leave "
            "it out"
        )
    if results.settings["control_variate"] is not None:
        raise ValueError(f"noise_batches={count!r} does not know the noise under control_variate: leave it out")


def _for_arviz(tree: xr.DataTree) -> Any:
    import arviz as az  # takes over a second

    return tree if hasattr(az, "convert_to_datatree") else az.InferenceData.from_datatree(tree)


def _side(mcmc: Any) -> Any:
    """The module that reads this MCMC, found without importing a host that is not there."""
    hosts = {base.__module__.partition(".")[0] for base in type(mcmc).__mro__}
    for host in ("numpyro", "pyro"):
        if host in hosts:
            return import_module(f"bnn_ppl.{host}.results")
    raise TypeError(
        f"mcmc must be a numpyro.infer.MCMC or pyro.infer.MCMC after its run, got {type(mcmc).__name__}: for other "
        "draws use arviz.from_dict"
    )


def _choose(var_names: str | Sequence[str] | None, sites: list[str]) -> list[str]:
    if var_names is None:
        return sites
    given = [var_names] if isinstance(var_names, str) else list(var_names)
    excluded = {plain(name[1:]) for name in given if name.startswith("~")}
    included = {plain(name) for name in given if not name.startswith("~")}
    unknown = sorted((excluded | included) - {plain(name) for name in sites})
    if unknown:
        raise ValueError(f"var_names={given!r} names {unknown}, and the sites are {sites}")
    everything = excluded and not included
    return [n for n in sites if (everything or plain(n) in included) and plain(n) not in excluded]


def _check_rows(rows: Any, results: Any) -> Arrays:
    """Chosen rows by plate."""
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


def _chunk_sizes(batch_size: int | Mapping[str, int] | None, plates: Mapping[str, Plate]) -> dict[str, int]:
    """Rows in a chunk by subsampled plate."""
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
class _Plan:
    """Which rows are wanted, by plate, and in chunks of how many rows the subsampled plates take them."""

    results: Any
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


def _constants(arguments: Arrays, observed: Arrays) -> Arrays:
    """The arguments that are no observations."""

    def same(a: np.ndarray, b: np.ndarray) -> bool:
        floats = a.dtype.kind == b.dtype.kind == "f"
        return a.shape == b.shape and bool((np.isclose(a, b, equal_nan=True) if floats else a == b).all())

    return {n: a for n, a in arguments.items() if not any(same(a, value) for value in observed.values())}


def _attributes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as netCDF can keep them; what a callable gave is among the statistics."""

    def keepable(value: Any) -> Any:
        if isinstance(value, numbers.Real | str) and not isinstance(value, bool):
            return value
        return json.dumps(value, default=_in_words)

    return {name: keepable(value) for name, value in settings.items() if value is not None}


def _in_words(value: Any) -> str:
    return repr(value) if is_dataclass(value) else getattr(value, "__name__", type(value).__name__)


def _warn_unfilled_cycle(results: Any) -> None:
    cycle = results.settings.get("step_size")
    if isinstance(cycle, Cyclical):
        taken = results.settings["num_warmup"] + results.settings["thinning"] * results.shape[1]
        if taken % cycle.draws_per_cycle:
            warnings.warn(
                f"the last cycle has {taken % cycle.draws_per_cycle} of its {cycle.draws_per_cycle} draws, so that "
                "cycles do not count alike: choose numbers of warm-up draws and of samples that fill cycles",
                UserWarning,
                stacklevel=3,
            )


def _warn_diverging(results: Any) -> None:
    diverging = results.statistics.get("diverging")
    if diverging is not None and diverging.any():
        advice = "raise target_accept_prob or reparametrise the model"
        if "step_size" in results.settings:
            advice = "lower step_size, raise friction where the kernel has one, or check the data and priors"
        warnings.warn(
            f"{int(diverging.sum())} of {diverging.size} draws diverged ({diverging.sum(axis=1).tolist()} by chain), "
            f"so the draws may not follow the posterior: {advice}. They are marked in sample_stats['diverging']",
            UserWarning,
            stacklevel=3,
        )


def _warn_hot(results: Any) -> None:
    """Warn where minibatch noise is stronger than the injected noise: it heats the momenta by the ratio of the two."""
    from bnn_ppl.diagnostics.temperature import batch_means_error  # scipy.stats takes a second

    name, subsampled = "kinetic_temperature", any(plate.subsampled for plate in results.plates.values())
    if name not in results.statistics or "friction" not in results.settings:
        return
    kinetic, temperature = (results.statistics[n].astype(np.float64) for n in (name, "temperature"))
    excess = kinetic - 2 * temperature
    if not subsampled or results.settings.get("resample_scale") is not None or not np.isfinite(excess).all():
        return
    if temperature.mean() > 0 and excess.mean() > 3 * batch_means_error(excess):  # NaN for too few draws to tell
        warnings.warn(
            f"the kinetic temperature is {kinetic.mean():.3g}, and temperature is {temperature.mean():.3g}: the noise "
            "of the minibatch gradients dominates the injected noise, so the draws do not follow the posterior. Lower "
            "step_size, take larger batches or more friction; suggest_step_size and bias_certificate help",
            UserWarning,
            stacklevel=3,
        )
