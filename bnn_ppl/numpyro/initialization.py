"""Where chains start: near the prior's centre, with the spread that networks are initialised with.

The hosts' default, uniform on (-2, 2) in unconstrained space, saturates a network of any width. Here each
unconstrained coordinate is the prior's centre plus s z with z standard normal and

* s = min(prior standard deviation, 1 / sqrt(fan_in)) on an unbounded site, where fan_in is the longer axis of a
  vector or matrix, and the product of all axes but the last of a convolution's kernel;
* s = 0.1 in unconstrained coordinates on any other site.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random
from numpyro.distributions import biject_to, constraints
from numpyro.infer.util import helpful_support_errors

from bnn_ppl.layout import check_start_value

_MEDIAN_DRAWS = 15


def init_to_prior_center(site: dict | None = None) -> Any:
    """NumPyro init strategy: the prior's centre plus fan-in sized noise.

    Parameters
    ----------
    site
        A NumPyro site message; left out, the strategy itself is returned, as the host's strategies do.

    Returns
    -------
    Array or None
        The start value, in the user's coordinates, of a continuous latent site; None for other sites.
    """
    if site is None:
        return partial(init_to_prior_center)
    if site["type"] != "sample" or site["is_observed"] or site["value"] is not None:
        return None
    if site["fn"].support.is_discrete:
        return None
    prior = site["fn"]
    with helpful_support_errors(site):
        transform = biject_to(prior.support)
    key_center, key_spread = random.split(site["kwargs"]["rng_key"])
    sample_shape = site["kwargs"].get("sample_shape", ())
    center = _center(prior, transform, key_center)
    center = jnp.broadcast_to(center, sample_shape + center.shape)
    spread = _spread(prior, sample_shape)
    return transform(center + spread * random.normal(key_spread, center.shape, center.dtype))


def _center(prior: Any, transform: Any, key: Array) -> Array:
    """Unconstrained prior mean; the median of draws where the mean is undefined; 0 for an improper prior."""
    try:
        from_mean = transform.inv(1.0 * prior.mean)
    except NotImplementedError:
        from_mean = jnp.full(transform.inverse_shape(prior.shape()), jnp.nan)
    known = jnp.isfinite(from_mean)
    if not isinstance(known, jax.core.Tracer) and known.all():
        return from_mean
    try:
        from_draws = jnp.median(transform.inv(prior.sample(key, (_MEDIAN_DRAWS,))), axis=0)
    except NotImplementedError:
        from_draws = jnp.zeros(from_mean.shape)
    return jnp.where(known, from_mean, from_draws)


def _spread(prior: Any, sample_shape: tuple[int, ...]) -> Array | float:
    support = prior.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is not constraints.real:
        return 0.1
    shape = sample_shape + prior.shape()
    fan_in = math.prod(shape[:-1]) if len(shape) > 2 else max(shape, default=1)
    widest = max(fan_in, 1) ** -0.5
    try:
        deviation = jnp.sqrt(prior.variance)
    except NotImplementedError:
        return widest
    return jnp.where(deviation < widest, deviation, widest)


def as_strategy(init_strategy: Callable | Mapping[str, Array] | None) -> Callable:
    """A strategy; values by site become one that starts the other sites near the prior's centre."""
    if init_strategy is None:
        return init_to_prior_center()
    if isinstance(init_strategy, Mapping):
        return partial(_init_to_given, {name: jnp.asarray(value) for name, value in init_strategy.items()})
    # A host's strategy may come as the function itself or with its options filled in.
    return init_strategy if isinstance(init_strategy, partial) else init_strategy()


def _init_to_given(values: Mapping[str, Array], site: dict) -> Any:
    if site["name"] not in values:
        return init_to_prior_center(site)
    shape = site["kwargs"].get("sample_shape", ()) + site["fn"].shape()
    check_start_value(site["name"], values[site["name"]].shape, shape)
    return values[site["name"]]
