"""The statistics of `bnn_ppl.statistics`, computed on trees of arrays."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def _products(a: Any, b: Any) -> Array:
    """Inner product of each leaf, shape (leaves,)."""
    return jnp.stack(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


def _sizes(z: Any, like: Array) -> Array:
    return jnp.array([leaf.size for leaf in jax.tree.leaves(z)], like.dtype)


def position_statistics(z: Any, energy: Array, gradient: Any) -> dict[str, Array]:
    """Statistics of a position; step size and temperature are added by the kernel."""
    virial, norm_sq, slope_sq = _products(z, gradient), _products(z, z), _products(gradient, gradient)
    sizes = _sizes(z, virial)
    return {
        "lp_minibatch": -energy,
        "configurational_temperature": virial.sum() / sizes.sum(),
        "site_configurational_temperature": virial / sizes,
        "position_norm_sq": norm_sq.sum(),
        "site_position_norm_sq": norm_sq,
        "gradient_norm": jnp.sqrt(slope_sq.sum()),
        "site_gradient_norm": jnp.sqrt(slope_sq),
    }


def momentum_statistics(z: Any, momentum: Any, gradient: Any, masses: Sequence[Any]) -> dict[str, Array]:
    """Statistics of a momentum; `masses` has an entry for each leaf."""
    norm_sq, along, uphill = (_products(momentum, tree) for tree in (momentum, z, gradient))
    weighted = [jnp.vdot(r, r / m) for r, m in zip(jax.tree.leaves(momentum), masses, strict=True)]
    sizes, kinetic = _sizes(z, norm_sq), jnp.stack(weighted)
    return {
        "kinetic_temperature": kinetic.sum() / sizes.sum(),
        "site_kinetic_temperature": kinetic / sizes,
        "position_momentum": along.sum(),
        "site_position_momentum": along,
        "momentum_norm_sq": norm_sq.sum(),
        "site_momentum_norm_sq": norm_sq,
        "momentum_gradient": uphill.sum(),
        "site_momentum_gradient": uphill,
    }
