"""Priors of torch networks: their laws in closed form, by kind of parameter, and inside models."""

import pickle
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC
from scipy import stats

from bnn_ppl.pyro import SGHMC, priors, random_torch_module

# Name, shape, fan-in (None: no weight) and centre of each kind of parameter.
KINDS = {
    "dense": ("0.weight", (50, 784), 784, 0.0),
    "vector output": ("weight", (1, 9), 9, 0.0),
    "convolution": ("features.0.weight", (8, 3, 5, 5), 75, 0.0),
    "grouped 1d convolution": ("conv.weight", (6, 2, 3), 6, 0.0),
    "recurrent": ("rnn.weight_hh_l0", (12, 3), 3, 0.0),
    "attention": ("attention.in_proj_weight", (12, 4), 4, 0.0),
    "bias": ("0.bias", (50,), None, 0.0),
    "attention bias": ("attention.in_proj_bias", (12,), None, 0.0),
    "bias of many axes": ("attention.bias_k", (1, 1, 4), None, 0.0),
    "normalisation scale": ("norm.weight", (8,), None, 1.0),
    "normalisation bias": ("norm.bias", (8,), None, 0.0),
    "the user's vector": ("slopes", (5,), None, 0.0),
    "the user's scalar": ("offset", (), None, 0.0),
}
ALL = {
    "normal": priors.normal(),
    "fan_in_normal": priors.fan_in_normal(),
    "laplace": priors.laplace(fan_in=True),
    "student_t": priors.student_t(fan_in=True),
    "hierarchical_normal": priors.hierarchical_normal(fan_in=True),
    "horseshoe": priors.horseshoe(fan_in=True),
}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def numbers(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("kind", KINDS)
def test_laws_by_kind_of_parameter(kind):
    name, shape, fan_in, center = KINDS[kind]
    root = 1.0 if fan_in is None else np.sqrt(fan_in)
    expected = {
        priors.normal(0.3): stats.norm(center, 0.3),
        priors.fan_in_normal(): stats.norm(center, 1.0 / root),
        priors.fan_in_normal(2.0, 0.4): stats.norm(center, 0.4 if fan_in is None else 2.0 / root),
        priors.laplace(0.3): stats.laplace(center, 0.3),
        priors.laplace(0.3, fan_in=True): stats.laplace(center, 0.3 / root),
        priors.student_t(4.0, 0.3): stats.t(4.0, center, 0.3),
        priors.student_t(scale=0.3, fan_in=True): stats.t(3.0, center, 0.3 / root),
    }
    if fan_in is None:  # too few numbers, or no reason, to learn a scale
        expected[priors.hierarchical_normal(0.3, fan_in=True)] = stats.norm(center, 0.3)
        expected[priors.horseshoe(0.3, 0.7, fan_in=True)] = stats.norm(center, 0.7)
    values = numbers(shape)
    for prior, law in expected.items():
        own = prior(name, shape)
        assert own.batch_shape == own.event_shape == ()
        log_density = own.expand(shape).log_prob(torch.tensor(values))
        np.testing.assert_allclose(log_density, law.logpdf(values), rtol=1e-10)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][2]])
@pytest.mark.parametrize("fan_in", [False, True])
def test_hierarchical_normal(kind, fan_in):
    name, shape, number, _ = KINDS[kind]
    scale = 0.3 / np.sqrt(number) if fan_in else 0.3
    prior = partial(priors.hierarchical_normal(0.3, fan_in=fan_in), name, shape)
    trace = poutine.trace(poutine.condition(prior, {f"{name}_scale": torch.tensor(0.8)})).get_trace()
    np.testing.assert_allclose(trace.log_prob_sum(), stats.halfnorm(scale=scale).logpdf(0.8))
    values = numbers(shape)
    own = trace.nodes["_RETURN"]["value"].expand(shape)
    np.testing.assert_allclose(own.log_prob(torch.tensor(values)), stats.norm(0.0, 0.8).logpdf(values))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][2]])
@pytest.mark.parametrize("fan_in", [False, True])
def test_horseshoe(kind, fan_in):
    name, shape, number, _ = KINDS[kind]
    root = np.sqrt(number) if fan_in else 1.0
    local = np.abs(numbers(shape, seed=1))
    values = {f"{name}_global": torch.tensor(0.8), f"{name}_local": torch.tensor(local)}
    prior = partial(priors.horseshoe(0.3, 2.0, fan_in=fan_in), name, shape)
    trace = poutine.trace(poutine.condition(prior, values)).get_trace()
    expected = stats.halfcauchy(scale=0.3 / root).logpdf(0.8) + stats.halfcauchy().logpdf(local).sum()
    np.testing.assert_allclose(trace.log_prob_sum(), expected)
    own, slab = trace.nodes["_RETURN"]["value"], 2.0 / root
    scale = 0.8 * local * np.sqrt(slab**2 / (slab**2 + 0.8**2 * local**2))  # equation (2.8) of Piironen and Vehtari
    weights = numbers(shape)
    np.testing.assert_allclose(own.log_prob(torch.tensor(weights)), stats.norm(0.0, scale).logpdf(weights))
    assert own.batch_shape == shape


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(1, 2, 3)
        self.norm = torch.nn.GroupNorm(1, 2)
        self.dense = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.dense(torch.tanh(self.norm(self.convolution(x))).flatten(1))


def classifier(prior, x, y):
    net = random_torch_module("net", MODULE, prior)
    with pyro.plate("data", len(x), subsample_size=4) as rows:
        pyro.sample("y", dist.Categorical(logits=net(x[rows])), obs=y[rows])


MODULE = Network().double()
X, Y = torch.tensor(numbers((12, 1, 4, 4))), torch.arange(12) % 3


@pytest.mark.parametrize(("name", "jit_compile"), [(name, False) for name in ALL] + [("horseshoe", True)])
def test_kernels_with_each_prior(name, jit_compile):
    model = partial(classifier, ALL[name])
    kernel = SGHMC(model, step_size=1e-3, friction=1.0, jit_compile=jit_compile)
    mcmc = MCMC(kernel, 3, warmup_steps=0, disable_progbar=True)
    mcmc.run(X, Y)
    samples = mcmc.get_samples()
    weights = {"net.convolution.weight", "net.dense.weight"}
    hyper = {"hierarchical_normal": ["scale"], "horseshoe": ["global", "local"]}.get(name, [])
    parameters = {f"net.{name}" for name, _ in MODULE.named_parameters()}
    assert set(samples) == parameters | {f"{weight}_{end}" for weight in weights for end in hyper}
    for value in samples.values():
        assert torch.isfinite(value).all()
        assert (value[0] != value[1]).any()
    assert not mcmc._diagnostics[0]["diverging"].any()


def test_fan_in_keeps_the_size_of_activations():
    width = 400
    module = torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False) for _ in range(4)])
    net = random_torch_module("net", module, priors.fan_in_normal(gain=1.0))
    # The relative error of each layer's mean square is sqrt(2 / width).
    size = net(torch.randn(1, width)).square().mean().item()
    assert abs(np.log(size)) < 4 * np.sqrt(5 * 2 / width)


def test_scales_that_the_model_samples():
    def model():
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        for name, prior in (
            ("a", priors.normal(scale)),
            ("b", priors.fan_in_normal(gain=scale, bias_scale=scale)),
            ("c", priors.student_t(df=scale, scale=scale, fan_in=True)),
            ("d", priors.horseshoe(scale, slab_scale=scale)),
            ("e", priors.hierarchical_normal(scale)),
        ):
            random_torch_module(name, MODULE, prior)

    trace = poutine.trace(poutine.condition(model, {"scale": torch.tensor(0.7)})).get_trace()
    assert trace.nodes["a.norm.bias"]["fn"].base_dist.scale.tolist() == [0.7, 0.7]
    np.testing.assert_allclose(trace.nodes["b.convolution.weight"]["fn"].base_dist.scale, 0.7 / 3.0)
    np.testing.assert_allclose(trace.nodes["e.dense.weight_scale"]["fn"].base_dist.scale, 0.7)


@pytest.mark.parametrize("name", ALL)
def test_priors_can_be_pickled(name):
    prior = pickle.loads(pickle.dumps(ALL[name]))
    draws = []
    for one in (prior, ALL[name]):
        pyro.set_rng_seed(1)
        draws.append(one("0.weight", (2, 3)).sample())
    assert torch.equal(*draws)


WRONG = {
    "scale": [partial(f, scale=s) for f in (priors.normal, priors.laplace, priors.horseshoe) for s in (0.0, -1.0, "1")]
    + [partial(f, scale=np.inf) for f in (priors.student_t, priors.hierarchical_normal)]
    + [partial(priors.normal, True), partial(priors.normal, np.nan), partial(priors.normal, None)],
    "gain": [partial(priors.fan_in_normal, gain=0.0), partial(priors.fan_in_normal, "0.weight", (3, 2))],
    "bias_scale": [partial(priors.fan_in_normal, bias_scale=-0.5)],
    "df": [partial(priors.student_t, df=0)],
    "slab_scale": [partial(priors.horseshoe, slab_scale=[1.0])],
    "fan_in": [
        partial(f, fan_in=784) for f in (priors.laplace, priors.student_t, priors.hierarchical_normal, priors.horseshoe)
    ],
}


@pytest.mark.parametrize("argument", WRONG)
def test_arguments_out_of_range(argument):
    for make in WRONG[argument]:
        with pytest.raises(ValueError, match=rf"^{argument} must be .*, got ") as caught:
            make()
        assert repr([*make.args, *make.keywords.values()][0]) in str(caught.value)
