"""Convolutions and max-pools that stay fast inside compiled loops on a CPU.

Inside `lax.scan` or `fori_loop`, XLA runs a convolution on a CPU by naive code unless it has one plain form:
channels last, input not dilated, no groups (jax issue 12868). JAX's gradients of a convolution have other
forms, and that of a max-pool is slow everywhere: a LeNet-5 step costs 10 to 25 times more inside a loop.

`fast_convolutions` traces a function and evaluates its program again with two primitives exchanged, before
anyone differentiates it:

- ``y = conv(x, w)`` runs with channels last, and so do its gradients. ``dw`` is a convolution of ``x`` with
  ``dy``, batch and channels swapped (where patches are tiny, as in a first layer: patches times ``dy``).
  ``dx`` is a convolution of ``dy`` with the flipped ``w``, or, where that would mostly multiply zeros
  (strides, unpadded edges), ``dy w'`` added back into place.
- ``y = max_pool(x)`` remembers which element of each window won: on ties the first one, as in JAX.

Results equal the original's up to rounding. Forward mode is lost, but not forward over reverse. Left as they
are: grouped, transposed (dilated input), complex and mixed-precision convolutions; dilated pools and those over
64 elements; all inside the network's own `scan`, `while`, `cond`, `shard_map` or custom-derivative functions.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import sequential_vmap
from jax.extend import core
from jax.extend.core import primitives

from bnn_ppl.numpyro.programs import as_function, inner_program

_MAX_PATCH = 32  # elements of a patch up to which patches and a matrix product beat a convolution


def fast_convolutions(fn: Callable) -> Callable:
    """Give a function whose convolutions and max-pools are fast inside loops on a CPU.

    Parameters
    ----------
    fn : callable
        A pure function of pytrees of arrays, such as a potential ``(params, *batch) -> ()``, with a network
        in Flax, Equinox or plain JAX. Wrap it *before* `jax.grad`.

    Returns
    -------
    callable
        The same function. Other platforms (by `jax.default_backend`), and functions with nothing to exchange,
        run `fn` itself, at the price of one more trace. Under `jax.vmap` (chains) each convolution runs one
        chain after another, because XLA has no fast form for a kernel per chain.
    """

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if jax.default_backend() == "cpu":
            closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
            if _has_replaceable(closed.jaxpr):
                out = _evaluate(closed.jaxpr, closed.consts, *jax.tree.leaves((args, kwargs)))
                return jax.tree.unflatten(jax.tree.structure(shapes), out)
        return fn(*args, **kwargs)

    return wrapped


def _has_replaceable(jaxpr: Any) -> bool:
    inner = ((eqn, inner_program(eqn)) for eqn in jaxpr.eqns)
    return any(_has_replaceable(sub.jaxpr) if sub else _replacement(eqn) is not None for eqn, sub in inner)


def _evaluate(jaxpr: Any, consts: Any, *args: Any) -> list:
    """Run a program on arrays or tracers, with the slow primitives exchanged."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, core.Literal) else env[v]

    for eqn in jaxpr.eqns:
        sub, operands = inner_program(eqn), eqn.invars
        if sub and _has_replaceable(sub.jaxpr):
            run: Any = functools.partial(_evaluate, sub.jaxpr, sub.consts)
            if eqn.primitive is primitives.remat_p:
                run = jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
        elif sub or not (run := _replacement(eqn)):
            operands = [v for v in eqn.invars if not isinstance(v, core.Literal)]
            run = as_function(jaxpr, eqn)
        env.update(zip(eqn.outvars, run(*map(read, operands)), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _replacement(eqn: Any) -> Callable | None:
    """The fast function for an equation, or None if it has to stay."""
    p, avals = eqn.params, [v.aval for v in eqn.invars]
    if not all(jnp.issubdtype(getattr(a, "dtype", bool), jnp.floating) for a in avals):
        return None
    if eqn.primitive is primitives.conv_general_dilated_p:
        plain = p["feature_group_count"] == p["batch_group_count"] == 1 and set(p["lhs_dilation"]) <= {1}
        same_type = avals[0].dtype == avals[1].dtype and p["preferred_element_type"] in (None, avals[0].dtype)
        sized = all(a.size for a in (*avals, eqn.outvars[0].aval)) and p["out_sharding"] is None
        return functools.partial(_any_layout, p) if plain and same_type and sized else None
    if eqn.primitive is primitives.reduce_window_max_p:
        plain = set(p["base_dilation"]) | set(p["window_dilation"]) <= {1}
        return functools.partial(_max_pool, p) if plain and math.prod(p["window_dimensions"]) <= 64 else None
    return None


def _any_layout(p: dict, x: Array, w: Array) -> list[Array]:
    """A convolution in any order of dimensions, by the channels-last one."""
    lhs, rhs, out = p["dimension_numbers"]
    conv = _channels_last(p["window_strides"], p["padding"], p["rhs_dilation"], p["precision"])
    y = conv(x.transpose(lhs[0], *lhs[2:], lhs[1]), w.transpose(*rhs[2:], rhs[1], rhs[0]))
    order = (out[0], *out[2:], out[1])  # where each dimension of y has to go
    return [y.transpose([order.index(i) for i in range(y.ndim)])]


def _channels_last(strides: Any, padding: Any, dilation: Any, precision: Any) -> Callable:
    """``conv(x, w)`` for x (n, *spatial, c), w (*window, c, o) and the result (n, *spatial', o)."""
    dims, spatial, end = range(len(strides)), range(1, len(strides) + 1), len(strides) + 1
    layout = lax.ConvDimensionNumbers((0, end, *spatial), (end, end - 1, *dims), (0, end, *spatial))

    raw = functools.partial(lax.conv_general_dilated, dimension_numbers=layout, precision=precision)

    def patches(x: Array, window: Any, outputs: Any) -> Array:
        """(n, *spatial, c) to (n, *spatial', prod(window) * c), by one concatenation per dimension."""
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*pad, 0) for pad in padding), (0, 0, 0)])
        for i in reversed(dims):
            starts, reach = range(0, window[i] * dilation[i], dilation[i]), (outputs[i] - 1) * strides[i] + 1
            x = jnp.concatenate([lax.slice_in_dim(x, a, a + reach, strides[i], i + 1) for a in starts], -1)
        return x

    @sequential_vmap
    def forward(x: Array, w: Array) -> Array:
        return raw(x, w, strides, padding, rhs_dilation=dilation)

    @sequential_vmap
    def input_gradient(x: Array, w: Array, dy: Array) -> Array:
        window, size, outputs = w.shape[:-2], x.shape[1:-1], dy.shape[1:-1]
        if set(strides) == {1} and 2 * math.prod(size) <= 3 * math.prod(outputs):
            low = [(window[i] - 1) * dilation[i] - padding[i][0] for i in dims]
            pads = [(low[i], size[i] - outputs[i] + padding[i][0]) for i in dims]
            return raw(dy, jnp.flip(w, dims).swapaxes(-1, -2), strides, pads, rhs_dilation=dilation)
        spread = jnp.matmul(dy, w.reshape(-1, w.shape[-1]).T, precision=precision)
        return jax.linear_transpose(lambda x: patches(x, window, outputs), x)(spread)[0]

    @sequential_vmap
    def kernel_gradient(x: Array, w: Array, dy: Array) -> Array:
        window, size, outputs = w.shape[:-2], x.shape[1:-1], dy.shape[1:-1]
        if math.prod(w.shape[:-1]) <= _MAX_PATCH:
            flat = patches(x, window, outputs).reshape(-1, math.prod(w.shape[:-1]))
            return jnp.matmul(flat.T, dy.reshape(-1, dy.shape[-1]), precision=precision).reshape(w.shape)
        reach = [(window[i] - 1) * dilation[i] + (outputs[i] - 1) * strides[i] + 1 for i in dims]
        pads = [(padding[i][0], reach[i] - size[i] - padding[i][0]) for i in dims]
        dw = raw(jnp.swapaxes(x, 0, -1), jnp.moveaxis(dy, 0, -2), dilation, pads, rhs_dilation=strides)
        return jnp.moveaxis(dw, 0, -2)

    def backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
        # XLA drops the input's gradient where nobody needs it.
        return input_gradient(*saved, dy), kernel_gradient(*saved, dy)

    conv = jax.custom_vjp(forward)
    conv.defvjp(lambda x, w: (forward(x, w), (x, w)), backward)
    return conv


def _max_pool(p: dict, x: Array) -> list[Array]:
    """Max-pool whose gradient places dy by the saved index of each window's first maximum."""
    strides, shape = p["window_strides"], x.shape
    starts = list(itertools.product(*map(range, p["window_dimensions"])))
    forward = functools.partial(primitives.reduce_window_max_p.bind, **p)

    def forward_and_winner(x: Array) -> tuple[Array, Array]:
        y = forward(x)
        padded = lax.pad(x, jnp.array(-jnp.inf, x.dtype), [(*pad, 0) for pad in p["padding"]])
        winner = jnp.zeros(y.shape, jnp.int8)
        for q, start in reversed(list(enumerate(starts))):
            stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, y.shape, strides, strict=True)]
            winner = jnp.where(lax.slice(padded, start, stop, strides) == y, jnp.int8(q), winner)
        return y, winner

    def backward(winner: Array, dy: Array) -> tuple[Array]:
        zero = jnp.zeros((), dy.dtype)
        dx = jnp.zeros(shape, dy.dtype)
        for q, start in enumerate(starts):  # undo the slice, the strides and the padding in one lax.pad
            sizes = zip(start, p["padding"], shape, dy.shape, strides, strict=True)
            edges = [(a - lo, n - (a - lo) - (m - 1) * s - 1, s - 1) for a, (lo, _), n, m, s in sizes]
            dx = dx + lax.pad(jnp.where(winner == q, dy, zero), zero, edges)
        return (dx,)

    pool = jax.custom_vjp(forward)
    pool.defvjp(forward_and_winner, backward)
    return [pool(x)]
