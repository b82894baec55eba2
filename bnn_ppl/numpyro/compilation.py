"""Programs that XLA compiles: functions with the data as arguments, and the loop over the gradient steps of a draw."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from bnn_ppl.settings import KernelSettings

_UNROLL = 4


def jit_over_data(fn: Callable, args: tuple, kwargs: dict) -> Callable:
    """``jit`` of ``fn(args, kwargs, *inputs)`` with the data as arguments: constants are copied into the program."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Array)}

    @jax.jit
    def compiled(arrays: dict[int, Array], *inputs: Any) -> Any:
        args, kwargs = jax.tree.unflatten(structure, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        return fn(args, kwargs, *inputs)

    def call(*inputs: Any) -> Any:
        try:
            return compiled(arrays, *inputs)
        except jax.errors.JAXTypeError:  # the model looks at the values of its data
            return compiled({}, *inputs)

    return call


def loop(gradient_step: Callable, start: tuple, step: Array, settings: KernelSettings) -> tuple:
    """Run ``gradient_step(carry, i)`` from gradient step `step` to the next draw."""
    cyclical = settings.cyclical
    if cyclical is None:
        count = settings.steps_per_draw
        return lax.scan(gradient_step, start, jnp.arange(count), unroll=min(_UNROLL, count))[0]
    block = math.gcd(_UNROLL, *cyclical.draw_ends)  # divides the steps between any two draws

    def steps(i: Array, carry: tuple) -> tuple:
        for j in range(block):
            carry, _ = gradient_step(carry, i * block + j)
        return carry

    return lax.fori_loop(0, cyclical.steps_to_draw(step) // block, steps, start)
