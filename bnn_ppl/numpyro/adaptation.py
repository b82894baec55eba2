"""Moving averages of squared gradients, and the masses that SGHMC makes of them during the warm-up.

With v the average of g~^2 over the last gradient steps, weighted so that it may start at 0, v_s its mean over a site s,
and w its decay, a site has [1]_ the first mass after n gradients, a coordinate i [2]_ the second::

    M_s = sigma_s / min sigma              sigma_s = sqrt(1e-7 + v_s)
    M_i = max(sigma_i / mean sigma, 1e-3)  sigma_i = sqrt(1e-7 + max(v_i, w^n v_s))

The share of v_s keeps coordinates whose first gradients happen to be small from too light masses.

References
----------
.. [1] Wenzel et al. (2020), How good is the Bayes posterior in deep neural networks really?
.. [2] Springenberg, Klein, Falkner & Hutter (2016), Bayesian optimization with robust Bayesian neural networks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bnn_ppl import updates
from bnn_ppl.numpyro.trees import number_of_coordinates


class Average(NamedTuple):
    """Moving average of squared gradients; `weight` is that of all it has, and at gradient step `until` it stops."""

    second_moment: Any
    weight: Array
    until: Array


def begin(z: Any, until: int) -> Average:
    """An average of nothing yet."""
    weight = jnp.zeros((), jnp.result_type(*jax.tree.leaves(z)))
    return Average(jax.tree.map(jnp.zeros_like, z), weight, jnp.int32(until))


def averaged(average: Average, gradient: Any, step: Array, decay: float) -> Average:
    """The average with the gradient of a step in it, before `until`."""
    keep = jnp.where(step < average.until, decay, 1.0)

    def moved(old: Array, value: Array | float) -> Array:
        return updates.moving_average(old, value, keep.astype(old.dtype))

    second_moment = jax.tree.map(lambda v, g: moved(v, g * g), average.second_moment, gradient)
    return Average(second_moment, moved(average.weight, 1.0), average.until)


def unbiased(average: Average) -> Any:
    """Mean squared gradient of each coordinate, 0 before there is a gradient."""
    weight = jnp.where(average.weight > 0, average.weight, 1.0)
    return jax.tree.map(lambda v: v / weight.astype(v.dtype), average.second_moment)


def masses(kind: str, average: Average) -> Any:
    """Mass of each site, a scalar, or of each coordinate."""
    squares, missing = unbiased(average), 1.0 - average.weight
    if kind == "adapt":
        sigma = jax.tree.map(lambda v: jnp.sqrt(1e-7 + v.mean()), squares)
        unit = jnp.stack(jax.tree.leaves(sigma)).min()
        return jax.tree.map(lambda s: (s / unit).astype(s.dtype), sigma)
    sigma = jax.tree.map(lambda v: jnp.sqrt(1e-7 + jnp.maximum(v, missing.astype(v.dtype) * v.mean())), squares)
    unit = jnp.stack([s.sum() for s in jax.tree.leaves(sigma)]).sum() / number_of_coordinates(sigma)
    return jax.tree.map(lambda s: jnp.maximum(s / unit, 1e-3).astype(s.dtype), sigma)
