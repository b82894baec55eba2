"""Draws of a finished MCMC or of a guide that SVI trained, of either host, for ArviZ.

The draws, their statistics and the data are gathered in a plain ``xarray.DataTree``, which ArviZ 1.x works with;
only at the end it becomes the ``InferenceData`` of ArviZ 0.x.
"""

import json
import numbers
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any

import numpy as np
import xarray as xr

from bnn_ppl.chunks import Plan, check_rows, chunk_sizes
from bnn_ppl.labels import Arrays, Labels, plain
from bnn_ppl.schedules import Cyclical, check_count
from bnn_ppl.svi_arguments import SVIArguments, ValueCheck, check_given, check_values, refuse_for_chains, warn_longer

_SAMPLE_DIMS = ("chain", "draw")


def to_arviz(
    source: Any,
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
    svi_result: Any = None,
    model_args: Sequence[Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int | None = None,
    losses: Any = None,
) -> Any:
    """Draws, statistics and data of a finished MCMC or a trained guide, as what the installed ArviZ works with.

    Parameters
    ----------
    source
        ``numpyro.infer.MCMC`` or ``pyro.infer.MCMC`` after ``run``, with a kernel of this library or of the host; or
        ``numpyro.infer.SVI`` or ``pyro.infer.SVI`` after its training, with a guide of this library, of the host or
        written by hand, or a subclass of this library, whose averaged guide is taken, or its snapshots.
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
        Of an MCMC: minibatches on which to measure the gradient noise at the last draw of each chain, at least 2, for
        `bnn_ppl.diagnostics.bias_certificate`; by default it is not measured.
    seed
        Seed of the draws of a guide, of the predictions and of these minibatches. The hosts' own random states are
        left alone.
    svi_result
        Of NumPyro's SVI: what ``svi.run`` returned, or the state that ``svi.update`` did.
    model_args, model_kwargs
        Of an SVI: positional and keyword arguments of model and guide, with all rows of the data. By default none.
    num_samples
        Of an SVI: number of draws from the guide, by default 1000. Snapshots are draws themselves.
    losses
        Of an SVI: the losses of its steps, shape (steps,). By default NumPyro's are those of `svi_result`.

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

        An SVI has one chain. Its `sample_stats` are `elbo` (chain, draw), the estimate log p(y, draw) - log q(draw) of
        each draw, `elbo_minibatch` where subsampled plates drew a minibatch for it; and of averages
        `averaging_weight` (snapshot), with the numbers of the steps as coordinates, or (chain, draw) where the
        snapshots are the draws, which have no ELBO. The group `svi` has `elbo` (step), minus the losses.

    Raises
    ------
    TypeError
        If `source` is no MCMC or SVI of NumPyro or Pyro, or an argument of an SVI has another type.
    ValueError
        If it has not run, or an argument does not fit the model or the kind of source; the message names both. Of an
        SVI, also if the model takes rows that its data do not have, or an observed site has values that are none of
        its classes.

    Warns
    -----
    UserWarning
        If draws diverged, which NumPyro cannot tell while it samples; if the noise of the minibatch gradients dominates
        the injected noise; or where draws do not fill the last cycle of `bnn_ppl.schedules.Cyclical`. Of an SVI, if
        observations have more rows than their plate. On Pyro, with `log_likelihood` or `posterior_predictive`, if batch
        normalisation has no statistics of the training data.

    Notes
    -----
    Log likelihoods and predictions visit the data in chunks of as many rows as a minibatch has. A model without
    subsampled plates is evaluated on all rows at once. An argument of the model with the name of
    a dimension gets an underscore at its end. Slashes in names become dots: ``"nn/Dense_0.kernel"`` of a Flax module
    is ``"nn.Dense_0.kernel"``, for a DataTree takes slashes for paths; `var_names` and `dims` take either.

    Draws of a guide are in the coordinates of the model, and so is log q; auxiliary sites of the guide are not among
    them. The ELBO is scaled as the hosts' ``Trace_ELBO`` scales it, whatever loss was trained, and by their convention
    the density of a point, as in AutoDelta, is 1: its `elbo` is log p(y, point), not a bound. Under
    ``local_reparameterization`` it is that of the draw, without noise in the layers. Draws of NumPyro's
    AutoLaplaceApproximation are of the approximation; Pyro's guide is the mode, until
    ``svi.guide = guide.laplace_approximation(x, y)``. Draws that a chunk of the data needs are made again, not kept.
    Where `model_args` are one batch and not the data, which observations show that do not follow the rows of a
    subsampled plate, there are no groups of data.

    Examples
    --------
    >>> tree = to_arviz(mcmc, log_likelihood=True)
    >>> az.summary(tree, var_names=["noise_scale"])
    >>> az.loo(tree)
    >>> to_arviz(svi, svi_result=svi_result, model_args=(x, y), num_samples=500)  # NumPyro
    >>> to_arviz(svi, model_args=(x, y), losses=losses)  # Pyro
    """
    host, kind = _host(source)
    side = import_module(f"bnn_ppl.{host}.results")
    given = SVIArguments(svi_result, model_args, model_kwargs, num_samples, losses, seed)
    value_checks: dict[str, ValueCheck] = {}
    if kind == "SVI":
        check_given(given, noise_batches)
        results, value_checks = import_module(f"bnn_ppl.{host}.svi_results").read(source, given)
        names = _choose(var_names, results.guide.names)
    else:
        refuse_for_chains(given)
        results = side.read(source)
        names = _choose(var_names, list(results.samples) + side.deterministics(results))
    if (log_likelihood or posterior_predictive) and results.model is None:
        raise ValueError(
            f"log_likelihood={log_likelihood}, posterior_predictive={posterior_predictive}: a chain of a potential_fn, "
            "or of minibatches=, or a guide with one batch as model_args, has no full data; leave both False, or call "
            "predict(source, x, y)"
        )
    if (rows is not None or batch_size is not None) and not (log_likelihood or posterior_predictive):
        raise ValueError(
            f"rows={rows!r}, batch_size={batch_size!r} have no effect without log_likelihood=True or "
            "posterior_predictive=True: leave them out"
        )
    _check_noise_batches(noise_batches, results)
    plan = Plan(results, check_rows(rows, results), chunk_sizes(batch_size, results.plates))
    labels = Labels(results, dims, coords)

    # A host's factor has a log density but no values.
    observed = [name for name, site in results.sites.items() if site.kind == "observed"]
    scored = [name for name, site in results.sites.items() if site.kind in ("observed", "factor")]
    data: Arrays = {}
    if results.model is not None:
        every_row = Plan(results, {}, chunk_sizes(None, results.plates))
        data = every_row.gather(observed, side.evaluator(results, "observed", observed, seed), None)
    if results.guide is not None and results.model is not None:  # chains looked at their data when they ran
        check_values(value_checks, data)
        warn_longer(data, results.sites, results.plates, list(side.arguments(results).values()))

    if results.guide is None:
        posterior, statistics = side.posterior(results, names), results.statistics
    else:
        posterior, statistics = results.guide.sample(names)
    groups = {
        "posterior": labels.dataset(posterior, _SAMPLE_DIMS),
        "sample_stats": labels.dataset(statistics, _SAMPLE_DIMS),
    }
    if noise_batches is not None:
        noise, sizes = side.gradient_noise(source, noise_batches, seed)
        groups["sample_stats"]["gradient_noise"] = ("chain", "site"), noise
        groups["sample_stats"]["site_size"] = ("site",), sizes
    for name in ("posterior", "sample_stats"):
        groups[name].attrs |= _attributes(results.settings)
    if results.guide is not None:
        _put_training(groups, results.guide)
    if results.model is not None:
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


def _put_training(groups: dict[str, xr.Dataset], guide: Any) -> None:
    """Add what has no draws: weights of the snapshots in an average, and the ELBO over the steps."""
    if guide.snapshots is not None:
        steps, weights = guide.snapshots
        stats = groups["sample_stats"].assign_coords(snapshot=np.asarray(steps))
        groups["sample_stats"] = stats.assign(averaging_weight=("snapshot", np.asarray(weights)))
    if guide.elbo is not None:
        # Not in `posterior`, for az.summary fails on variables without draws.
        groups["svi"] = xr.Dataset({"elbo": ("step", guide.elbo)}, {"step": np.arange(1, len(guide.elbo) + 1)})


def _host(source: Any) -> tuple[str, str]:
    """Host and kind of a source, found without importing a host that is not there."""
    for base in type(source).__mro__:
        host = base.__module__.partition(".")[0]
        if host in ("numpyro", "pyro") and base.__name__ in ("MCMC", "SVI"):
            return host, base.__name__
    raise TypeError(
        f"source must be a numpyro.infer.MCMC or pyro.infer.MCMC after its run, or an SVI of theirs, got "
        f"{type(source).__name__}: for other draws use arviz.from_dict"
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
