"""Posterior predictive of held-out rows, in batches of rows and of draws.

With p_s(y | x) the predictive distribution of a row under draw s = 1, ..., S, and m_s and v_s its mean and variance::

    p(k | x)     = mean_s p_s(k | x)
    E y, Var y   = mean_s m_s,  mean_s v_s + var_s m_s
    log p(y | x) = log mean_s p_s(y | x)

The model runs as it is, with every plate holding all its rows and the data plate those of the batch, in one compiled
program for all batches.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array, lax, random
from numpyro import distributions as dist
from numpyro.contrib.module import ParamShape
from numpyro.distributions.distribution import validation_enabled
from numpyro.handlers import seed as seed_handler
from numpyro.handlers import substitute, trace
from numpyro.primitives import Messenger

from bnn_ppl import responses
from bnn_ppl.layout import check_dtype_of_classes, check_observation
from bnn_ppl.numpyro.convolutions import fast_convolutions
from bnn_ppl.numpyro.draws import Origin, origin_of
from bnn_ppl.numpyro.initialization import init_to_prior_center
from bnn_ppl.numpyro.layout import number_of_classes, plates_of
from bnn_ppl.numpyro.plates import SetPlates, as_arrays
from bnn_ppl.numpyro.results import to_numpy
from bnn_ppl.predictions import Plan, at_expectation, make_plan, predict_all

_WRAPPERS = (dist.ExpandedDistribution, dist.Independent, dist.MaskedDistribution)


def predict(
    source: Any,
    *args: Any,
    model: Callable | None = None,
    params: Mapping[str, Any] | None = None,
    scheme: str = "ensemble",
    num_draws: int | None = None,
    site: str | None = None,
    functions: bool = False,
    row_batch_size: int | None = 1000,
    draw_batch_size: int | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> xr.Dataset:
    """Average predictions for held-out rows over the draws of a posterior, or predict with one value of the weights.

    Parameters
    ----------
    source
        ``numpyro.infer.MCMC`` after ``run``, with a kernel of this library or of the host; or a dict of draws by site,
        such as ``mcmc.get_samples()``, in the user's coordinates, shapes (draws, ...) or (chains, draws, ...); or a
        guide after its training, written by hand or from ``autoguide``.
    *args, **kwargs
        The model's arguments for the held-out data. Arrays as long as the first one are cut into batches of rows, the
        others go to the model as they are. With observations, ``predict(mcmc, x_test, y_test)``, there are log
        densities too; without, give None or what else the model takes for them.
    model
        By default that of the MCMC's kernel. Draws and guides need it. Its data plate may be subsampled, or state the
        number of training data.
    params
        Values of ``param`` sites by name, ``svi_result.params`` for a guide. By default those that the kernel holds.
    scheme
        How many values of the weights are predicted with [1]_: ``"ensemble"`` averages the predictions of all draws;
        ``"stochastic"`` takes one draw at random, of all chains; ``"deterministic"`` takes the expected values of the
        latent sites in the user's coordinates, in one forward pass. These are means over chains and draws, the
        ``median`` of a guide that has one, as those of ``autoguide`` do, and means over the draws of other guides.
    num_draws
        Draws taken of each chain, evenly spaced, by default all; or drawn from a guide, by default 1000. With
        ``"stochastic"`` there is one, and a guide's ``median`` takes none.
    site
        The observed site to predict, where the model has several.
    functions
        Whether to keep the prediction of each draw, for `bnn_ppl.diagnostics.function_diagnostics`.
    row_batch_size
        Rows evaluated at a time, at most: what a network computes for that many has to fit into memory. None for all.
    draw_batch_size
        Draws evaluated at a time, at most. By default more of them the fewer rows and weights there are.
    seed
        Seed of the draws from a guide, and of the one draw of ``"stochastic"``.

    Returns
    -------
    xarray.Dataset
        Rows come first, then other plates and events of the site.

        * For categorical and Bernoulli sites `probabilities` (row, class), and `mean_entropy` (row), the average
          over the draws of the entropy in nats, which `bnn_ppl.diagnostics.mutual_information` takes.
        * For others `mean`, `sd` (both of a new observation) and `function_sd`, the standard deviation of the mean
          over the draws, shapes (row, ...), in the units of the observations.
        * With observations `log_density` (row), the log of the mean density in nats, joint over what is not the row;
          `draw_log_density` (chain, draw), summed over the rows; and `observed`, class numbers or values.
        * With `functions` also `functions` (chain, draw, row, ...), probabilities or means, and for others than
          classes `noise_sd`, the standard deviation of an observation under each draw, of the same shape.

        With one value of the weights, chain and draw have the length 1, and `function_sd` is 0.

    Raises
    ------
    TypeError
        If `source` is none of the three, or `params` no dict.
    ValueError
        If the model and its arguments do not fit the draws or each other, there are not as many draws, the model is
        random given a draw, the scheme is unknown or does not go with `num_draws`, `seed` or integer draws, or a
        prediction is not finite; the message names the site and the remedy.

    Warns
    -----
    UserWarning
        With ``"deterministic"``, if the expected values of weights are all exactly 0, as those of a variance network.

    Notes
    -----
    Memory does not grow with the number of draws, but for `functions`. Models run under ``jax.jit``, so they cannot
    look at the values of their arguments, and arguments named as those above must be bound before:
    ``model=functools.partial(model, seed=1)``.

    References
    ----------
    .. [1] Neklyudov, Molchanov, Ashukha & Vetrov (2018), Variance networks: when expectation does not meet your
       expectations.

    Examples
    --------
    >>> found = predict(mcmc, x_test, y_test)
    >>> accuracy(found["probabilities"], found["observed"])
    >>> predict(guide, x_test, model=model, params=svi_result.params)["mean"]
    """
    responses.check_numbers(num_draws=num_draws, row_batch_size=row_batch_size, draw_batch_size=draw_batch_size)
    responses.check_scheme(scheme, num_draws, seed)
    responses.check_params(params, "give svi_result.params")
    args, kwargs = as_arrays((args, kwargs))
    with validation_enabled(False):
        origin = origin_of(source, model, dict(params or {}), scheme, num_draws, seed, args, kwargs)
        data = _data(args, kwargs)
        _hold_shapes(origin, data)
        plan = make_plan(
            partial(_look, origin, data),
            list(data.lengths.values()),
            origin.draws,
            site=site,
            scheme=scheme,
            num_draws=num_draws,
            row_batch_size=row_batch_size,
            draw_batch_size=draw_batch_size,
            seed=seed,
        )

        @jax.jit
        def evaluate(draws: dict[str, Array], arrays: dict[int, Array], first: Array, key: Array) -> dict[str, Array]:
            args, kwargs = data.arguments(data.cut(arrays, first, plan.row_batch))
            return jax.vmap(fast_convolutions(lambda draw: _one(origin, plan, draw, args, kwargs, key)))(draws)

        def values(draws: dict[str, Array], first: int, key: int = 0) -> dict[str, np.ndarray]:
            return jax.tree.map(to_numpy, evaluate(draws, data.arrays, np.int32(first), random.key(key)))

        read: Callable[..., dict[str, Array]] = partial(origin.read, plan.latent)
        if scheme == "deterministic":
            plan, read = at_expectation(plan, read, to_numpy, lambda like, value: jnp.asarray(value, like.dtype))
        if plan.others:
            first_draws = read(*next(plan.draw_batches())[1])
            runs = [values(first_draws, 0, key) for key in range(2)]
            responses.check_settled(plan.response.name, runs, plan.others)
        return predict_all(plan, read, values, functions=functions, loose=data.loose())


class _Data(NamedTuple):
    """Arguments of the model: all leaves, the arrays among them, and the lengths of those that have one."""

    leaves: list[Any]
    structure: Any
    arrays: dict[int, Array]
    lengths: dict[int, int]
    rows: int

    def arguments(self, arrays: Mapping[int, Array]) -> tuple[tuple, dict]:
        """Positional and keyword arguments with these arrays in place."""
        return jax.tree.unflatten(self.structure, [arrays.get(i, leaf) for i, leaf in enumerate(self.leaves)])

    def cut(self, arrays: Mapping[int, Array], first: Any, rows: int) -> dict[int, Array]:
        """The arrays with some of their rows."""
        return {
            i: lax.dynamic_slice_in_dim(a, first, rows) if self.lengths.get(i) == self.rows else a
            for i, a in arrays.items()
        }

    def shapes(self, rows: int) -> dict[int, Any]:
        """The arrays' shapes with another number of rows."""
        return {
            i: jax.ShapeDtypeStruct((rows, *a.shape[1:]) if self.lengths.get(i) == self.rows else a.shape, a.dtype)
            for i, a in self.arrays.items()
        }

    def loose(self) -> list[np.ndarray]:
        """Arrays that are not cut."""
        return [to_numpy(self.arrays[i]) for i, length in self.lengths.items() if length != self.rows]


def _data(args: tuple, kwargs: dict) -> _Data:
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Array)}
    lengths = {i: len(array) for i, array in arrays.items() if array.ndim}
    return _Data(leaves, structure, arrays, lengths, responses.number_of_rows(list(lengths.values())))


class _AllRows(SetPlates):
    """Plates with all their rows; those of a constant size, if it is given, with those of the held-out data."""

    def __init__(self, fn: Callable, rows: int, constant: int | None):
        super().__init__(fn, lambda name, size, subsample_size: jnp.arange(rows if size == constant else size))

    def process_message(self, msg: dict) -> None:
        """Put the rows in, and let data pass as they are; called by NumPyro."""
        super().process_message(msg)
        if msg["type"] == "subsample":
            msg["kwargs"]["event_dim"] = None


class _FindRandomKeys(Messenger):
    """Note whether the model asks for random keys of its own."""

    found = False

    def process_message(self, msg: dict) -> None:
        self.found |= msg["type"] == "prng_key"


def _recorder(origin: Origin, rows: int, constant: int | None) -> tuple[trace, _FindRandomKeys]:
    """Handler that traces the model with values from its priors, and the one that finds random keys."""
    keys = _FindRandomKeys(seed_handler(substitute(origin.model, data=origin.held), random.key(0)))
    return trace(_AllRows(substitute(keys, substitute_fn=init_to_prior_center()), rows, constant)), keys


def _hold_shapes(origin: Origin, data: _Data) -> None:
    """Hold the params that are mere shapes: all that random_flax_module and its like leave where all is sampled."""
    recorder, _ = _recorder(origin, data.rows, None)
    with suppress(Exception):  # of which the look tells
        jax.eval_shape(lambda arrays: _run(recorder, data, arrays), data.shapes(data.rows))
    for name, site in recorder.trace.items():
        if site["type"] == "param" and all(isinstance(leaf, ParamShape) for leaf in jax.tree.leaves(site["value"])):
            origin.held.setdefault(name, site["value"])


def _run(recorder: trace, data: _Data, arrays: Mapping[int, Array]) -> None:
    args, kwargs = data.arguments(arrays)
    recorder.get_trace(*args, **kwargs)


def _look(origin: Origin, data: _Data, rows: int, constant: int | None) -> responses.Look:
    """Run the model on shapes alone."""
    recorder, keys = _recorder(origin, rows, constant)
    sites, error = {}, None
    try:
        jax.eval_shape(lambda arrays: _run(recorder, data, arrays), data.shapes(rows))
        sites = {name: found for name, site in recorder.trace.items() if (found := _describe(site))}
    except Exception as failure:
        error = failure
        if isinstance(error, jax.errors.JAXTypeError):
            error.add_note("predict runs the model under jax.jit: it cannot look at the values of its arguments")
    unknown = [n for n, s in recorder.trace.items() if s["type"] == "param" and n not in origin.held]
    if unknown:
        raise ValueError(f"the param sites {unknown} of the model have no values: pass params={{{unknown[0]!r}: ...}}")
    stateless = [n for n, s in recorder.trace.items() if s["type"] == "mutable" and s["value"] is None]
    if isinstance(error, AssertionError) and stateless:  # the host's network asserts them where its params are given
        raise ValueError(
            f"the mutable sites {stateless} of the model have no values, such as the running statistics of batch "
            "normalisation: pass params=update_batch_norm(model, draw, batches, ...), joined by | to other params"
        ) from error
    if keys.found:
        raise ValueError(
            "the model draws random keys of its own (numpyro.prng_key, as dropout does), so that a draw has no "
            "definite prediction: switch that off"
        )
    return responses.Look(sites, {plate.size for plate in plates_of(recorder.trace).values()}, error)


def _describe(site: dict) -> responses.Site | None:
    if site["type"] != "sample":
        return None
    fn, shape = site["fn"], jnp.shape(site["value"])
    if site["is_observed"]:
        if 0 in shape:  # a factor
            return None
        check_observation(site["name"], shape, fn.batch_shape, fn.event_shape)
        if classes := number_of_classes(fn):
            check_dtype_of_classes(site["name"], jnp.result_type(site["value"]), classes)
        shape = jnp.broadcast_shapes(shape, fn.shape())
    plates = {frame.dim: frame.name for frame in site["cond_indep_stack"]}
    return responses.Site(site["name"], site["is_observed"], shape, fn.event_dim, plates)


def _one(origin: Origin, plan: Plan, draw: dict[str, Array], args: tuple, kwargs: dict, key: Array) -> dict[str, Array]:
    """What one draw predicts for some rows, which come first in each array."""
    model = seed_handler(substitute(origin.model, data=origin.held | draw), key)
    sites = trace(_AllRows(model, plan.row_batch, plan.constant)).get_trace(*args, **kwargs)
    site, axis = sites[plan.response.name], plan.response.axis
    fn, value = site["fn"], site["value"]
    values = _moments(fn, plan.response)
    if site["is_observed"]:
        log_density = jnp.broadcast_to(fn.log_prob(value), fn.batch_shape)
        by_row = jnp.moveaxis(log_density, axis + fn.event_dim, 0)
        values["log_density"] = by_row.reshape(len(by_row), -1).sum(-1)
        values["observed"] = jnp.moveaxis(jnp.broadcast_to(value, fn.shape()), axis, 0)
    return values


def _moments(fn: Any, response: responses.Site) -> dict[str, Array]:
    """Class probabilities and their entropy, or mean and variance, with the rows first."""
    base = fn
    while isinstance(base, _WRAPPERS):
        base = base.base_dist
    if isinstance(base, dist.CategoricalProbs | dist.CategoricalLogits):
        probabilities = base.probs
    elif isinstance(base, dist.BernoulliProbs | dist.BernoulliLogits):
        probabilities = jnp.stack([1 - base.probs, base.probs], -1)
    else:
        try:
            moments = {"mean": fn.mean, "variance": fn.variance}
        except NotImplementedError as error:
            raise ValueError(responses.no_moments(response.name, type(base).__name__)) from error
        shape = fn.shape()
        return {n: jnp.moveaxis(jnp.broadcast_to(v, shape), response.axis, 0) for n, v in moments.items()}
    whole = jnp.broadcast_to(probabilities, (*fn.shape(), probabilities.shape[-1]))
    by_row = jnp.moveaxis(whole, response.axis - 1, 0)
    return {"probabilities": by_row, "entropy": jax.scipy.special.entr(by_row).sum(-1)}
