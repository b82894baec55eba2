"""How noisy minibatch gradients are at a position: their variance over minibatches, by Welford's recursion."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from bnn_ppl.numpyro.minibatches import next_rows, start_stream
from bnn_ppl.numpyro.potential import Target
from bnn_ppl.numpyro.trees import leaf_names


def gradient_noise(
    target: Target, z: Any, temperature: Any, rng_key: Array, count: int, subsampling: str
) -> dict[Any, Array]:
    """Variance of a component of the minibatch gradient (sum scale), averaged over the coordinates of each site.

    Parameters
    ----------
    target
        Of a kernel with subsampled plates.
    z
        Position, unconstrained.
    temperature
        T, which weighs the log-Jacobian.
    rng_key
        For the minibatches.
    count
        How many of them, at least 2.
    subsampling
        The kernel's.

    Returns
    -------
    dict
        V by site.
    """

    def add(carry: tuple, step: Array) -> tuple[tuple, None]:
        stream, mean, square = carry
        batch, stream = next_rows(target.plates, rng_key, stream, step, subsampling)
        gradient = jax.grad(target.energy)(z, temperature, batch)
        rest = jax.tree.map(jnp.subtract, gradient, mean)
        mean = jax.tree.map(lambda m, r: m + r / (step + 1), mean, rest)
        square = jax.tree.map(lambda s, r, g, m: s + r * (g - m), square, rest, gradient, mean)
        return (stream, mean, square), None

    zeros = jax.tree.map(jnp.zeros_like, z)
    (_, _, square), _ = lax.scan(add, (start_stream(target.plates), zeros, zeros), jnp.arange(count, dtype=jnp.int32))
    leaves = jax.tree.leaves(square)
    return {name: leaf.mean() / (count - 1) for name, leaf in zip(leaf_names(z), leaves, strict=True)}
