"""Where `predict` has its draws from: a finished MCMC, a dict of draws, or a guide."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro.handlers import seed as seed_handler
from numpyro.handlers import substitute, trace
from numpyro.infer import MCMC, SVI

from bnn_ppl import responses
from bnn_ppl.numpyro.averaged_guide import AveragedGuide
from bnn_ppl.numpyro.results import read as read_mcmc


class Origin(NamedTuple):
    """A model, values of its param sites, its draws, and how to read those of some sites at some indices."""

    model: Callable
    held: dict[str, Any]
    draws: responses.Draws
    read: Callable[..., dict[str, Array]]


def origin_of(
    source: Any,
    model: Any,
    params: dict[str, Any],
    scheme: str,
    num_draws: int | None,
    seed: int,
    args: tuple,
    kwargs: dict,
) -> Origin:
    """Draws and model; `args` and `kwargs` are those of the model, which guides take too, the rest as in `predict`."""
    if isinstance(source, MCMC):
        results = read_mcmc(source)
        samples, held = results.samples, results.held
        observed: tuple[str, ...] = ()
        if model is None and results.model is not None:
            model = results.model
            observed = tuple(name for name, site in results.sites.items() if site.kind == "observed")
        elif model is None:  # with minibatches=, kernels hide their model, for which nobody has all data
            model, held = getattr(source.sampler, "_model", None), getattr(source.sampler, "_held", None) or {}
            responses.check_model(model, "a chain of a potential_fn")
        draws = responses.Draws(_shapes(samples), (2,), observed)
        return Origin(model, held | params, draws, partial(_take, samples))
    if isinstance(source, Mapping):
        responses.check_model(model, "a dict of draws")
        responses.check_draws(source)
        samples = {name: v if isinstance(v, np.ndarray | Array) else np.asarray(v) for name, v in source.items()}
        return Origin(model, params, responses.Draws(_shapes(samples), (1, 2)), partial(_take, samples))
    responses.check_source(source, "numpyro", SVI)
    params = getattr(source, "averaged_params", {}) | params
    responses.check_model(model, "a guide")
    takes_medians = responses.takes_medians(source, scheme, num_draws)
    draw = _guide_draw(source, params, seed, args, kwargs)
    if takes_medians:
        samples = {name: value[None] for name, value in _medians(source, params, args, kwargs).items()}
        return Origin(model, params, responses.Draws(_shapes(samples), (1,)), partial(_take, samples))
    several = jax.jit(jax.vmap(draw))
    total = 1 if scheme == "stochastic" else num_draws or responses.GUIDE_DRAWS
    first = jax.eval_shape(several, np.zeros(total, np.int32))
    return Origin(
        model,
        params,
        responses.Draws(_shapes(first), (1,)),
        lambda names, index: {name: value for name, value in several(index).items() if name in names},
    )


def _shapes(samples: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in samples.items()}


def _take(samples: Mapping[str, Any], names: list[str], *index: np.ndarray) -> dict[str, Array]:
    return {name: jnp.asarray(samples[name][index]) for name in names}


def _guide_draw(guide: Callable, params: dict[str, Any], seed: int, args: tuple, kwargs: dict) -> Callable:
    """Function of a number that gives the draw of that number, values by site."""
    responses.check_trained(guide)

    def sites(key: Array) -> dict[str, dict]:
        return trace(seed_handler(substitute(guide, data=params), key)).get_trace(*args, **kwargs)

    found: list[dict] = []
    jax.eval_shape(lambda: found.append(sites(random.key(0))))
    missing = [name for name, site in found[0].items() if site["type"] == "param" and name not in params]
    if missing:
        raise ValueError(f"params has no values for {missing} of the guide: pass params=svi_result.params")

    def draw(number: Any) -> dict[str, Array]:
        key = random.fold_in(random.key(seed), number)
        if hasattr(guide, "sample_posterior"):  # AutoLaplaceApproximation itself has its mode only
            return guide.sample_posterior(key, params, *args, **kwargs)
        return {name: site["value"] for name, site in sites(key).items() if site["type"] == "sample"}

    return draw


def _medians(guide: Any, params: dict[str, Any], args: tuple, kwargs: dict) -> dict[str, Array]:
    """Medians by site, in the user's coordinates."""
    try:
        found = guide.median(params, *args, **kwargs) if isinstance(guide, AveragedGuide) else guide.median(params)
    except NotImplementedError:
        found = {}
    sites = getattr(guide, "prototype_trace", {})
    latent = [name for name, site in sites.items() if site["type"] == "sample" and not site["is_observed"]]
    responses.check_medians(guide, found, latent)
    return {name: jnp.asarray(value) for name, value in found.items()}
