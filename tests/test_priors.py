"""The same prior density on both backends for the same weights, whichever axes they are stored in."""

import jax
import numpy as np
import numpyro
import pyro
import pytest
import torch
from numpyro import handlers

import bnn_ppl.numpyro.priors as numpyro_priors
import bnn_ppl.pyro.priors as pyro_priors

# Parameter by parameter, name and axes (of torch's shape) in torch, flax and equinox.
SHAPES = {
    "dense": ((4, 3), "0.weight", ("Dense_0.kernel", (1, 0)), ("layers[0].weight", (0, 1))),
    "convolution": ((4, 2, 5, 3), "1.weight", ("Conv_0.kernel", (2, 3, 1, 0)), ("layers[1].weight", (0, 1, 2, 3))),
    "norm": ((4,), "2.weight", ("LayerNorm_0.scale", (0,)), ("layers[2].weight", (0,))),
    "bias": ((4,), "0.bias", ("Dense_0.bias", (0,)), ("layers[0].bias", (0,))),
}
PRIORS = {
    "normal": {"scale": 0.7},
    "fan_in_normal": {"gain": 1.4, "bias_scale": 0.3},
    "laplace": {"scale": 0.7, "fan_in": True},
    "student_t": {"df": 4.0, "scale": 0.7, "fan_in": True},
    "hierarchical_normal": {"scale": 0.7, "fan_in": True},
    "horseshoe": {"scale": 0.7, "slab_scale": 1.5, "fan_in": True},
}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float32)


def values_of(name, shape):
    """Values of a parameter, and of the sites that a prior may sample for it, by site."""
    rng = np.random.default_rng(0)
    weights, local = rng.normal(size=shape), np.abs(rng.normal(size=shape))
    return {name: weights, f"{name}_scale": 0.6, f"{name}_global": 0.8, f"{name}_local": local}


def densities_in_pyro(prior, name, shape):
    """Log density by site, the parameter's own name left out of it."""
    values = {site: torch.as_tensor(value) for site, value in values_of(name, shape).items()}

    def model():
        pyro.sample(name, prior(name, shape).expand(shape).to_event(len(shape)))

    trace = pyro.poutine.trace(pyro.poutine.condition(model, values)).get_trace()
    trace.compute_log_prob()
    return {site.removeprefix(name): trace.nodes[site]["log_prob_sum"].item() for site in trace.observation_nodes}


def densities_in_numpyro(prior, name, axes, shape):
    values = {s: np.transpose(v, axes) if np.ndim(v) else v for s, v in values_of(name, shape).items()}
    own = values[name].shape

    def model():
        numpyro.sample(name, prior(name, own).expand(own).to_event(len(own)))

    sites = handlers.trace(handlers.substitute(handlers.seed(model, 0), values)).get_trace()
    return {site.removeprefix(name): s["fn"].log_prob(s["value"]).item() for site, s in sites.items()}


@pytest.mark.parametrize("parameter", SHAPES)
@pytest.mark.parametrize("name", PRIORS)
def test_the_same_density_on_both_backends(name, parameter):
    shape, torch_name, *others = SHAPES[parameter]
    expected = densities_in_pyro(getattr(pyro_priors, name)(**PRIORS[name]), torch_name, shape)
    for other, axes in others:
        found = densities_in_numpyro(getattr(numpyro_priors, name)(**PRIORS[name]), other, axes, shape)
        assert found.keys() == expected.keys()
        for site, value in found.items():
            np.testing.assert_allclose(value, expected[site], rtol=1e-9)
