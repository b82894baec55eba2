"""Networks of the host's random_*_module functions with our priors and kernels."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen, nnx
from jax import random
from numpyro.contrib.module import random_eqx_module, random_flax_module, random_nnx_module
from numpyro.infer import MCMC, Predictive
from numpyro.infer.util import potential_energy

from bnn_ppl.numpyro import SGHMC, full_data, priors

N, B = 12, 4
rng = np.random.default_rng(0)
X = rng.normal(size=(N, 4, 4, 1))
Y = np.arange(N) % 3
PRIORS = {
    "normal": priors.normal(0.5),
    "fan_in_normal": priors.fan_in_normal(),
    "laplace": priors.laplace(fan_in=True),
    "student_t": priors.student_t(fan_in=True),
    "hierarchical_normal": priors.hierarchical_normal(fan_in=True),
    "horseshoe": priors.horseshoe(fan_in=True),
}
PLAIN = [pytest.param(name, marks=pytest.mark.slow) for name in ("normal", "laplace", "student_t")]
ENDS = {"hierarchical_normal": ["scale"], "horseshoe": ["global", "local"]}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(2, (3, 3), padding="VALID", name="first")(x)
        x = jnp.tanh(linen.LayerNorm(name="norm")(x))
        return linen.Dense(3, name="last")(x.reshape(len(x), -1))


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(1, 2, (3, 3), padding="VALID", rngs=rngs)
        self.norm = nnx.LayerNorm(2, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.norm(self.first(x)))
        return self.last(x.reshape(len(x), -1))


class Equinox(equinox.Module):
    first: equinox.nn.Conv2d
    norm: equinox.nn.GroupNorm
    last: equinox.nn.Linear

    def __init__(self, key):
        self.first = equinox.nn.Conv2d(1, 2, 3, key=key)
        self.norm = equinox.nn.GroupNorm(1, 2)
        self.last = equinox.nn.Linear(8, 3, key=key)

    def __call__(self, x):
        x = jnp.moveaxis(x, -1, 0)  # channels come first here
        return self.last(jnp.tanh(self.norm(self.first(x))).ravel())


def networks(prior):
    """One network of each of the host's functions; called inside a model."""
    return {
        "linen": random_flax_module("linen", Linen(), prior, input_shape=(1, 4, 4, 1)),
        "nnx": random_nnx_module("nnx", NNX(nnx.Rngs(0)), prior),
        "equinox": jax.vmap(random_eqx_module("equinox", Equinox(random.key(0)), prior)),
    }


def single_layers(prior):
    """The same of one layer, which compile in a third of the time."""
    return {
        "linen": random_flax_module("linen", linen.Dense(3), prior, input_shape=(1, 16)),
        "nnx": random_nnx_module("nnx", nnx.Linear(16, 3, rngs=nnx.Rngs(0)), prior),
        "equinox": jax.vmap(random_eqx_module("equinox", equinox.nn.Linear(16, 3, key=random.key(0)), prior)),
    }


SHAPES = {
    f"{host}/{layer}.{name}": shape
    for host, layer, names, shapes in [
        ("linen", "first", ("kernel", "bias"), ((3, 3, 1, 2), (2,))),
        ("nnx", "first", ("kernel", "bias"), ((3, 3, 1, 2), (2,))),
        ("equinox", "first", ("weight", "bias"), ((2, 1, 3, 3), (2, 1, 1))),
        ("linen", "norm", ("scale", "bias"), ((2,), (2,))),
        ("nnx", "norm", ("scale", "bias"), ((2,), (2,))),
        ("equinox", "norm", ("weight", "bias"), ((2,), (2,))),
        ("linen", "last", ("kernel", "bias"), ((8, 3), (3,))),
        ("nnx", "last", ("kernel", "bias"), ((8, 3), (3,))),
        ("equinox", "last", ("weight", "bias"), ((3, 8), (3,))),
    ]
    for name, shape in zip(names, shapes, strict=True)
}


def model_of(networks, prior):
    def model(x, y=None, subsample_size=None):
        nets = networks(prior)
        with numpyro.plate("data", len(x), subsample_size=subsample_size) as rows:
            logits = sum(net(x[rows]) for net in nets.values())
            numpyro.sample("y", dist.Categorical(logits=logits), obs=None if y is None else y[rows])

    return model


@pytest.mark.parametrize("name", ["fan_in_normal", "hierarchical_normal", "horseshoe", *PLAIN])
def test_kernels_with_each_prior_on_the_hosts_networks(name):
    model = model_of(single_layers, PRIORS[name])
    kernel = SGHMC(model, step_size=1e-3, friction=1.0)
    mcmc = MCMC(kernel, num_warmup=0, num_samples=3, progress_bar=False)
    mcmc.run(random.key(0), X.reshape(N, 16), Y, subsample_size=B, extra_fields=("diverging",))
    samples = {site: value for site, value in mcmc.get_samples().items() if "/" in site}
    weights = {"linen/kernel", "nnx/kernel", "equinox/weight"}
    biases = {"linen/bias", "nnx/bias", "equinox/bias"}
    assert set(samples) == weights | biases | {f"{weight}_{end}" for weight in weights for end in ENDS.get(name, [])}
    for value in samples.values():
        assert np.isfinite(value).all()
        assert (value[0] != value[1]).any()
    assert not mcmc.get_extra_fields()["diverging"].any()
    if name == "fan_in_normal":
        predicted = Predictive(full_data(model), samples)(random.key(1), X.reshape(N, 16), subsample_size=B)
        assert predicted["y"].shape == (3, N)


def test_log_joint_of_a_model_written_by_hand():
    prior = priors.fan_in_normal(gain=1.5, bias_scale=0.5)
    scales = {"first": 1.5 / 3.0, "last": 1.5 / np.sqrt(8.0)}
    values, expected = {site: rng.normal(size=shape) for site, shape in SHAPES.items()}, 0.0
    for site, value in values.items():
        layer, name = site.partition("/")[2].split(".")
        law = dist.Normal(0.0, 0.5) if name == "bias" else dist.Normal(0.0, scales.get(layer, 1.0))
        law = dist.Normal(1.0, 0.5) if layer == "norm" and name != "bias" else law
        expected -= law.log_prob(value).sum()

    x = jnp.asarray(X)
    total = 0.0
    for host in ("linen", "nnx", "equinox"):
        w = {site.partition("/")[2]: value for site, value in values.items() if site.startswith(host)}
        first = host == "equinox"
        kernel = w["first.weight"].transpose(2, 3, 1, 0) if first else w["first.kernel"]
        layout = ("NHWC", "HWIO", "NHWC")
        hidden = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout)
        hidden += w["first.bias"].ravel()
        axes = (1, 2, 3) if first else -1  # one group of all channels and pixels, or the channels of a pixel
        epsilon = 1e-5 if first else 1e-6
        spread = jnp.sqrt(hidden.var(axes, keepdims=True) + epsilon)
        hidden = (hidden - hidden.mean(axes, keepdims=True)) / spread
        hidden = jnp.tanh(hidden * w["norm.weight" if first else "norm.scale"] + w["norm.bias"])
        flat = (jnp.moveaxis(hidden, -1, 1) if first else hidden).reshape(N, -1)
        total += flat @ (w["last.weight"].T if first else w["last.kernel"]) + w["last.bias"]
    expected -= dist.Categorical(logits=total).log_prob(Y).sum()
    energy = jax.jit(lambda z: potential_energy(model_of(networks, prior), (x, jnp.asarray(Y)), {}, z))(values)
    np.testing.assert_allclose(energy, expected, rtol=1e-8)


def test_only_some_parameters_and_a_scale_for_all():
    def model(x, y):
        gain = numpyro.sample("gain", dist.HalfNormal(1.0))
        kernel = priors.fan_in_normal(gain=gain)("kernel", (16, 3))
        net = random_flax_module("net", linen.Dense(3), {"kernel": kernel}, input_shape=(1, 16))
        with numpyro.plate("data", len(x), subsample_size=B) as rows:
            numpyro.sample("y", dist.Categorical(logits=net(x[rows])), obs=y[rows])

    kernel = SGHMC(model, step_size=1e-3, friction=1.0)
    mcmc = MCMC(kernel, num_warmup=0, num_samples=2, progress_bar=False)
    mcmc.run(random.key(0), X.reshape(N, 16), Y)
    assert {"gain", "net/kernel"} == {site for site in mcmc.get_samples() if "$" not in site}
