"""Positions are trees of arrays, one leaf a site: what kernels compute over all leaves."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bnn_ppl.numpyro import noise


def leaf_names(z: Any) -> list[Any]:
    """Site name of each leaf of `z` in flattening order; None for positions that are no dict of arrays."""
    leaves = jax.tree.leaves(z)
    flat_dict = isinstance(z, dict) and len(leaves) == len(z) and all(isinstance(k, str) for k in z)
    return sorted(z) if flat_dict else [None] * len(leaves)


def draw_noise(words: Array, counter: Array, z: Any, kind: str) -> Any:
    """Standard noise in the shape of `z`: one stream, of which each leaf takes its stretch."""
    leaves, structure = jax.tree.flatten(z)
    pieces, start = [], 0
    for leaf in leaves:
        piece = noise.normal(words, counter, leaf.size, leaf.dtype, kind, offset=start)
        pieces.append(piece.reshape(leaf.shape))
        start += leaf.size
    return jax.tree.unflatten(structure, pieces)


def dot(a: Any, b: Any) -> Array:
    """Inner product over all leaves."""
    return jnp.asarray(sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b))))


def number_of_coordinates(z: Any) -> int:
    """Of all leaves together."""
    return sum(leaf.size for leaf in jax.tree.leaves(z))


def where(condition: Array, if_true: Any, if_false: Any) -> Any:
    """`jnp.where` over all leaves."""
    return jax.tree.map(partial(jnp.where, condition), if_true, if_false)


def as_float(x: Any) -> Array:
    """An array of strong type, as every later step gives it."""
    dtype = jnp.result_type(x)
    return jnp.asarray(x, dtype if jnp.issubdtype(dtype, jnp.inexact) else float)
