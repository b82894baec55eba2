"""`fast_convolutions` keeps values and gradients, and leaves no slow form in the program."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from bnn_ppl.numpyro.convolutions import fast_convolutions

NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
CNHW = ("CNHW", "IOHW", "HWNC")  # an order that nobody uses


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def equations(jaxpr):
    """All equations, those of inner programs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def slow_forms(fn, *args):
    """Convolutions and pools of a program that XLA has no fast code for inside a loop."""
    slow = []
    for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr):
        name, p = eqn.primitive.name, eqn.params
        if name == "conv_general_dilated":
            last = tuple(range(1, eqn.outvars[0].aval.ndim - 1))
            end = len(last) + 1
            lhs, rhs, out = p["dimension_numbers"]
            plain = lhs == out == (0, end, *last) and rhs == (end, end - 1, *range(end - 1))
            if not plain or set(p["lhs_dilation"]) != {1} or p["feature_group_count"] * p["batch_group_count"] > 1:
                slow.append(name)
        elif name.startswith("select_and"):
            slow.append(name)
    return slow


def names(fn, *args):
    return {eqn.primitive.name for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr)}


def assert_same(fn, *args, fast=True, rtol=1e-10):
    """Equal values and gradients for every argument, by a program without slow forms."""
    new = fast_convolutions(fn)
    every = tuple(range(len(args)))
    plain, ours = jax.value_and_grad(fn, every), jax.value_and_grad(new, every)
    expected, found = jax.jit(plain)(*args), jax.jit(ours)(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=rtol, atol=rtol), expected, found)
    assert jax.tree.map(lambda a: a.dtype, expected) == jax.tree.map(lambda a: a.dtype, found)
    if fast:
        assert slow_forms(plain, *args)  # the check can fail
        assert not slow_forms(ours, *args)


def conv_loss(strides, padding, dilation=None, layout=NHWC, **kwargs):
    def loss(w, x):
        y = lax.conv_general_dilated(x, w, strides, padding, rhs_dilation=dilation, dimension_numbers=layout, **kwargs)
        return jnp.sum(jnp.sin(y) * jnp.arange(1, y.size + 1).reshape(y.shape) / y.size)

    return loss


PADDINGS = ["SAME", "VALID", [(2, 1), (0, 3)], [(-1, 2), (1, -1)]]


@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@pytest.mark.parametrize(("strides", "dilation"), [((1, 1), (1, 1)), ((1, 1), (2, 1)), ((2, 3), (1, 2))])
@pytest.mark.parametrize("channels", [1, 8])  # patches below and above the limit
def test_convolution_2d(strides, dilation, padding, channels):
    assert_same(conv_loss(strides, padding, dilation), draw(3, 2, channels, 4), draw(2, 9, 10, channels, seed=1))


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize("layout", [NCHW, CNHW], ids=str)
def test_any_order_of_dimensions(layout, strides):
    sizes = {"O": 4, "I": 7, "N": 2, "C": 7}
    w = draw(*(sizes.get(c, 3) for c in layout[1]))
    x = draw(*(sizes.get(c, 8) for c in layout[0]), seed=1)
    assert_same(conv_loss(strides, "SAME", layout=layout), w, x)


@pytest.mark.parametrize("dimensions", [1, 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_convolution_1d_and_3d(dimensions, padding):
    letters = "DHW"[-dimensions:]
    layout = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    w, x = draw(*[3] * dimensions, 12, 4), draw(2, *[7] * dimensions, 12, seed=1)
    assert_same(conv_loss((1,) * dimensions, padding, layout=layout), w, x)


def test_kernel_of_one_pixel_with_stride():
    assert_same(conv_loss((2, 2), "VALID"), draw(1, 1, 40, 4), draw(2, 8, 8, 40, seed=1))


@pytest.mark.parametrize(
    ("w", "kwargs"),
    [
        ((3, 3, 2, 8), {"feature_group_count": 4}),
        ((3, 3, 8, 4), {"batch_group_count": 2}),
        ((3, 3, 8, 4), {"lhs_dilation": (2, 2)}),
    ],
    ids=["groups", "batch groups", "transposed"],
)
def test_other_convolutions_stay(w, kwargs):
    w = draw(*w)
    loss, x = conv_loss((1, 1), [(1, 1), (1, 1)], **kwargs), draw(4, 6, 6, 8, seed=1)
    assert_same(loss, w, x, fast=False)
    assert str(jax.make_jaxpr(loss)(w, x)) == str(jax.make_jaxpr(fast_convolutions(loss))(w, x))


def pool_loss(window, strides, padding, **kwargs):
    def loss(x):
        y = lax.reduce_window(x, -jnp.inf, lax.max, (1, *window, 1), (1, *strides, 1), padding, **kwargs)
        return jnp.sum(y * y * jnp.arange(1, y.size + 1).reshape(y.shape))

    return loss


@pytest.mark.parametrize(
    ("window", "strides"), [((2, 2), (2, 2)), ((3, 2), (2, 1)), ((3, 3), (1, 1)), ((2, 2), (3, 3))], ids=str
)
@pytest.mark.parametrize("padding", ["SAME", "VALID", [(0, 0), (1, 1), (0, 2), (0, 0)]], ids=str)
def test_max_pool(window, strides, padding):
    x = jnp.round(draw(2, 7, 8, 3))  # with ties
    assert_same(pool_loss(window, strides, padding), x)


def test_large_window_and_other_pools_stay():
    def loss(x):
        y = lax.reduce_window(x, -jnp.inf, lax.max, (1, 9, 9, 1), (1, 1, 1, 1), "VALID")
        return y.sum() + nn.avg_pool(x, (2, 2)).sum()

    x = draw(2, 9, 9, 3)
    assert str(jax.make_jaxpr(loss)(x)) == str(jax.make_jaxpr(fast_convolutions(loss))(x))


class Linen(nn.Module):
    """A small LeNet."""

    @nn.compact
    def __call__(self, x):
        for features in (3, 5):
            x = nn.relu(nn.Conv(features, (3, 3), padding="VALID", param_dtype=float)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(4, param_dtype=float)(x.reshape(x.shape[0], -1))


class Nnx(nnx.Module):
    """The same with nnx."""

    def __init__(self, rngs):
        self.first = nnx.Conv(1, 3, (3, 3), padding="VALID", rngs=rngs, param_dtype=float)
        self.second = nnx.Conv(3, 5, (3, 3), padding="SAME", rngs=rngs, param_dtype=float)
        self.last = nnx.Linear(45, 4, rngs=rngs, param_dtype=float)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.first(x)), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(self.second(x)), (2, 2), (2, 2))
        return self.last(x.reshape(x.shape[0], -1))


class Equinox(eqx.Module):
    """The same with Equinox: channels first, one image at a time."""

    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    pool: eqx.nn.MaxPool2d
    last: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.Conv2d(1, 3, 3, key=keys[0], dtype=float)
        self.second = eqx.nn.Conv2d(3, 5, 3, padding=1, key=keys[1], dtype=float)
        self.pool = eqx.nn.MaxPool2d(2, 2)
        self.last = eqx.nn.Linear(45, 4, key=keys[2], dtype=float)

    def __call__(self, x):
        x = self.pool(jax.nn.relu(self.first(x)))
        return self.last(self.pool(jax.nn.relu(self.second(x))).ravel())


def lenet(framework):
    """A potential of (params, indices, images) and its arguments."""
    images, labels = draw(20, 14, 14, 1), jnp.arange(20) % 4
    if framework == "linen":
        net = Linen()
        params, apply = net.init(jax.random.key(0), images), net.apply
    elif framework == "nnx":
        graph, params = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param)
        apply = lambda params, x: nnx.merge(graph, params)(x)  # noqa: E731
    else:
        params, static = eqx.partition(Equinox(jax.random.key(0)), eqx.is_array)
        apply = lambda p, x: jax.vmap(eqx.combine(p, static))(x.transpose(0, 3, 1, 2))  # noqa: E731

    def potential(params, rows):
        logits = jax.nn.log_softmax(apply(params, images[rows]))
        return -jnp.take_along_axis(logits, labels[rows][:, None], 1).sum()

    return potential, params, jnp.array([3, 1, 4, 1, 5, 9])


@pytest.mark.parametrize("framework", ["linen", "nnx", "equinox"])
def test_lenet_of_each_framework(framework):
    potential, params, rows = lenet(framework)
    assert_same(lambda p: potential(p, rows), params)


def test_chains_and_loops():
    potential, params, rows = lenet("equinox")
    chains = jax.tree.map(lambda p: jnp.stack([p, 1.1 * p, p - 0.1]), params)

    def final(fn):
        gradient = jax.grad(fn)

        def step(p, rows):
            return jax.tree.map(lambda a, g: a - 1e-2 * g, p, gradient(p, rows)), ()

        return lambda p: lax.scan(step, p, jnp.stack([rows, rows + 1, rows + 2]), unroll=2)[0]

    expected = jax.jit(jax.vmap(final(potential)))(chains)
    run = final(fast_convolutions(potential))
    for many in (jax.vmap(run), lambda p: lax.map(run, p)):
        found = jax.jit(many)(chains)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-11), expected, found)
    assert slow_forms(jax.vmap(final(potential)), chains)
    assert not slow_forms(jax.vmap(run), chains)


def test_pmap():
    potential, params, rows = lenet("linen")
    found = jax.pmap(jax.grad(fast_convolutions(potential)))(jax.tree.map(lambda a: a[None], params), rows[None])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b[0], a, rtol=1e-10, atol=1e-12),
        jax.grad(potential)(params, rows),
        found,
    )


def test_hessian_vector_product():
    loss, w, x = conv_loss((1, 1), "SAME"), draw(3, 3, 8, 4), draw(2, 6, 6, 8, seed=1)
    hvp = lambda fn: jax.jvp(lambda w: jax.grad(fn)(w, x), (w,), (w,))[1]  # noqa: E731
    np.testing.assert_allclose(hvp(fast_convolutions(loss)), hvp(loss), rtol=1e-10, atol=1e-12)


def test_nothing_to_replace():
    def loss(p, x, scale=1.0):
        return {"loss": scale * jnp.tanh(x @ p).sum()}, None

    args = draw(3, 2), draw(4, 3)
    traced = jax.make_jaxpr(lambda p, x: fast_convolutions(loss)(p, x, scale=2.0))(*args)
    assert str(traced) == str(jax.make_jaxpr(lambda p, x: loss(p, x, scale=2.0))(*args))


def test_other_platforms_use_the_function_itself(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    loss, w, x = conv_loss((1, 1), "SAME", layout=NCHW), draw(4, 3, 3, 3), draw(2, 3, 6, 6)
    assert str(jax.make_jaxpr(fast_convolutions(loss))(w, x)) == str(jax.make_jaxpr(loss)(w, x))


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(jax.jit(f)))])
def test_inside_calls(wrap):
    loss = wrap(conv_loss((1, 1), "VALID"))
    args = draw(3, 3, 8, 4), draw(2, 6, 6, 8, seed=1)
    assert_same(lambda w, x: 2 * loss(w, x) + loss(2 * w, x), *args)
    remat = "remat2" in names(jax.grad(loss), *args) or "checkpoint" in names(jax.grad(loss), *args)
    found = names(jax.grad(fast_convolutions(loss)), *args)
    assert ("remat2" in found or "checkpoint" in found) == remat


def test_custom_derivatives_are_kept():
    plain = conv_loss((1, 1), "VALID")
    vjp = jax.custom_vjp(plain)
    vjp.defvjp(lambda w, x: (plain(w, x), (w, x)), lambda saved, g: (7 * g * saved[0], saved[1]))
    jvp = jax.custom_jvp(plain)
    jvp.defjvp(lambda primals, tangents: (plain(*primals), 3 * jnp.vdot(primals[0], tangents[0])))
    w, x = draw(3, 3, 8, 4), draw(2, 6, 6, 8, seed=1)
    for rule, factor in ((vjp, 7), (jvp, 3)):
        found = jax.grad(fast_convolutions(lambda w, x, rule=rule: rule(w, x) + plain(w, x)))(w, x)
        np.testing.assert_allclose(found, factor * w + jax.grad(plain)(w, x), rtol=1e-10)


def test_users_own_loop_random_bits_and_effects():
    seen = []

    def loss(w, x, key):
        jax.debug.callback(lambda v: seen.append(float(v)), w[0, 0, 0, 0])
        noise = jax.random.normal(key, x.shape)
        mean = lax.fori_loop(0, 3, lambda i, s: s + i * x.mean(), 0.0)
        mean = lax.cond(mean > 0, jnp.sin, jnp.cos, mean)
        return conv_loss((1, 1), "SAME")(w, x + noise) * mean

    args = draw(3, 3, 8, 4), draw(2, 6, 6, 8, seed=1), jax.random.key(0)
    expected = jax.grad(loss)(*args)
    np.testing.assert_allclose(jax.grad(fast_convolutions(loss))(*args), expected, rtol=1e-10, atol=1e-12)
    jax.effects_barrier()
    assert len(seen) == 2


def test_the_first_layers_input_gradient_is_dropped():
    loss, args = fast_convolutions(conv_loss((1, 1), "SAME")), (draw(3, 3, 8, 4), draw(2, 6, 6, 8, seed=1))

    def convolutions(argnums):
        return jax.jit(jax.grad(loss, argnums)).lower(*args).compile().as_text().count(" convolution(")

    assert (convolutions(0), convolutions((0, 1))) == (2, 3)
