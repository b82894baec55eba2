"""Which layers of NumPyro models get local noise, and its law; mirrors tests/pyro/test_local_layers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from jax import lax
from numpyro import handlers
from numpyro.contrib.module import random_nnx_module
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.initialization import init_to_value

from bnn_ppl.numpyro import (
    local_reparameterization,
)
from tests import local


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def outputs(model, guide, *args, seed=0, sites=None):
    """What a model under local reparameterisation calls f."""
    model, guide = local_reparameterization(model, guide, sites=sites)
    guided = handlers.trace(handlers.seed(guide, seed)).get_trace(*args)
    run = handlers.seed(handlers.replay(model, guided), seed + 1)
    return np.asarray(handlers.trace(run).get_trace(*args)["f"]["value"])


def guide_of(loc, scale):
    def guide(*args):
        numpyro.sample("w", dist.Normal(jnp.asarray(loc), jnp.asarray(scale)).to_event(loc.ndim))

    return guide


@jax.jit
def inner(x, w):
    return jax.checkpoint(jnp.dot)(x, w)


DENSE = {
    "matmul": lambda x, w: x @ w,
    "transposed": lambda x, w: (w.T @ x.T).T,
    "einsum": lambda x, w: jnp.einsum("bi,io->bo", x, w),
    "jit": inner,
    "vmap": lambda x, w: jax.vmap(lambda row: row @ w)(x),
    "pieces": lambda x, w: jnp.concatenate([x @ w[:, :1], x @ w[:, 1:]], -1),
    "reshaped": lambda x, w: x @ (-2.0 * -w.reshape(-1, 1).reshape(w.shape) / 2.0).astype(x.dtype),
}


@pytest.mark.parametrize("layer", DENSE)
@pytest.mark.filterwarnings("ignore:the sites .* are in several layers")
def test_moments_of_a_dense_layer(layer):
    def model(x):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([local.INPUTS, local.OUTPUTS]).to_event(2))
        numpyro.deterministic("f", DENSE[layer](x, w))

    x = jnp.broadcast_to(local.ROW, (local.ROWS, local.INPUTS))
    found = outputs(model, guide_of(local.LOC, local.SCALE), x)
    mean, variance = local.dense(local.ROW, local.LOC), local.dense(local.ROW**2, local.SCALE**2)
    local.check_moments(found, mean, variance)


def test_layers_have_noise_of_their_own():
    def model(x):
        prior = dist.Normal(0.0, 1.0).expand([local.INPUTS, local.OUTPUTS]).to_event(2)
        numpyro.deterministic("f", jnp.concatenate([x @ numpyro.sample(name, prior) for name in ("w", "v")], -1))

    def guide(x):
        for name in ("w", "v"):
            numpyro.sample(name, dist.Normal(jnp.asarray(local.LOC), jnp.asarray(local.SCALE)).to_event(2))

    found = outputs(model, guide, jnp.broadcast_to(local.ROW, (local.ROWS, local.INPUTS)))
    mean, variance = local.dense(local.ROW, local.LOC), local.dense(local.ROW**2, local.SCALE**2)
    local.check_moments(found, np.tile(mean, 2), np.tile(variance, 2))


FUNCTIONS = {
    "gate": lambda x, w: x @ (w * (w > 0)),
    "norm": lambda x, w: x @ (w / jnp.linalg.norm(w)),
    "silu": lambda x, w: x @ jax.nn.silu(w),
    "square": lambda x, w: x @ w**2,
    "rows": lambda x, w: x @ w[jnp.array([0, 0, 1, 2])],
    "both": lambda x, w: x[:, : local.OUTPUTS] @ (w.T @ w),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_of_weights_are_of_the_draw(function):
    """What is no layer of the weights themselves has the same draw in each row."""

    def model(x):
        prior = dist.Normal(0.0, 1.0).expand([local.INPUTS, local.OUTPUTS]).to_event(2)
        v, w = numpyro.sample("v", prior), numpyro.sample("w", prior)
        numpyro.deterministic("f", jnp.concatenate([x @ v, FUNCTIONS[function](x, w)], -1))

    def guide(x):
        for name in ("v", "w"):
            numpyro.sample(name, dist.Normal(jnp.asarray(local.LOC), jnp.asarray(local.SCALE)).to_event(2))

    spread = outputs(model, guide, jnp.broadcast_to(local.ROW, (local.ROWS, local.INPUTS))).std(0)
    assert spread[: local.OUTPUTS].min() > 0.1
    assert spread[local.OUTPUTS :].max() < 1e-9


def test_latents_of_rows_are_drawn():
    """Each enters several outputs of its row, which must stay dependent."""
    ones = jnp.ones((1, 3))

    def model(x):
        v = numpyro.sample("v", dist.Normal(0.0, 1.0).expand([local.INPUTS, 3]).to_event(2))
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(1), 1.0).to_event(1))
        numpyro.deterministic("f", jnp.concatenate([x @ v, z @ ones], -1))

    def guide(x):
        numpyro.sample("v", dist.Normal(0.0, 1.0).expand([local.INPUTS, 3]).to_event(2))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("z", dist.Normal(jnp.zeros(1), 1.0).to_event(1))

    found = outputs(model, guide, jnp.ones((5, local.INPUTS)))
    assert found[:, :3].std(0).min() > 0.1
    assert found[:, 3:].std(1).max() < 1e-9


def test_chosen_sites():
    def model(x):
        prior = dist.Normal(0.0, 1.0).expand([local.INPUTS, local.OUTPUTS]).to_event(2)
        numpyro.deterministic("f", jnp.concatenate([x @ numpyro.sample(name, prior) for name in ("v", "w")], -1))

    def guide(x):
        for name in ("v", "w"):
            numpyro.sample(name, dist.Normal(jnp.asarray(local.LOC), jnp.asarray(local.SCALE)).to_event(2))

    x = jnp.broadcast_to(local.ROW, (local.ROWS, local.INPUTS))
    for sites in (["v"], lambda name, shape: name == "v" and shape == (local.INPUTS, local.OUTPUTS)):
        spread = outputs(model, guide, x, sites=sites).std(0)
        assert spread[: local.OUTPUTS].min() > 0.1
        assert spread[local.OUTPUTS :].max() < 1e-9
    local.check_sites_refused(lambda sites: outputs(model, guide, x, sites=sites))
    with pytest.raises(ValueError, match=r"sites must be a list of names or a callable .* got 'v': give \['v'\]"):
        outputs(model, guide, x, sites="v")


LAYOUTS = {"last": ("NHWC", "HWIO", "NHWC"), "first": ("NCHW", "OIHW", "NCHW")}


@pytest.mark.parametrize("channels", LAYOUTS)
def test_moments_of_a_convolution(channels):
    def model(x):
        shape = (local.WINDOW, local.WINDOW, local.INPUTS, local.OUTPUTS)
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand(shape).to_event(4))
        if channels == "first":
            x, w = x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1)
        y = lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=LAYOUTS[channels])
        numpyro.deterministic("f", y.transpose(0, 2, 3, 1) if channels == "first" else y)

    x = jnp.broadcast_to(local.IMAGE, (local.ROWS, *local.IMAGE.shape))
    found = outputs(model, guide_of(local.KERNEL_LOC, local.KERNEL_SCALE), x)
    mean = local.convolution(local.IMAGE, local.KERNEL_LOC)
    local.check_moments(found, mean, local.convolution(local.IMAGE**2, local.KERNEL_SCALE**2))


def test_moments_of_a_network():
    def model(x):
        prior = lambda name, shape: dist.Normal(0.0, 1.0)  # noqa: E731
        net = random_nnx_module("net", nnx.Linear(local.INPUTS, local.OUTPUTS, rngs=nnx.Rngs(0)), prior)
        numpyro.deterministic("f", net(x))

    x = jnp.broadcast_to(local.ROW, (local.ROWS, local.INPUTS))
    start = init_to_value(values={"net/kernel": local.LOC, "net/bias": jnp.ones(local.OUTPUTS)})
    guide = AutoNormal(model, init_loc_fn=start, init_scale=0.3)
    with handlers.seed(rng_seed=0):
        guide(x)
    found = outputs(model, guide, x)
    bias = handlers.trace(handlers.seed(guide, 0)).get_trace(x)["net/bias"]["value"]
    mean = local.dense(local.ROW, local.LOC) + np.asarray(bias)  # drawn once
    local.check_moments(found, mean, local.dense(local.ROW**2, np.full(local.LOC.shape, 0.09)))
