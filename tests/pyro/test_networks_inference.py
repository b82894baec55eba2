"""Networks from torch modules in every inference, and what is refused."""

import copy
import pickle
import warnings
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.nn import PyroModule

import bnn_ppl
from bnn_ppl.pyro import SGHMC, SGLD, full_data, priors, random_torch_module
from tests.pyro.networks import NAMES, NORMAL, PRIORS, SITES, B, N, X, Y, learned, looked, model_of, perceptron, run


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)


# Every inference


@pytest.mark.parametrize("kernel", [SGLD, partial(SGHMC, friction=1.0)])
def test_kernels_on_minibatches_with_and_without_compilation(kernel):
    model = model_of(perceptron(), PRIORS | {"2.weight": NORMAL})  # torch compiles no multivariate normal in silence
    minibatch = partial(model, subsample_size=B)
    chains = {}
    for jit_compile in (False, True):
        pyro.set_rng_seed(0)
        mcmc = run(minibatch, X, Y, kernel=kernel, steps_per_draw=2, jit_compile=jit_compile)
        chains[jit_compile] = mcmc.get_samples()
        assert set(chains[jit_compile]) == SITES
        for value in chains[jit_compile].values():
            assert torch.isfinite(value).all()
            assert (value[1:] != value[:-1]).any()
    for name in SITES:
        torch.testing.assert_close(chains[True][name], chains[False][name], rtol=1e-8, atol=1e-8)
    assert (chains[False]["net.2.bias"] > 0).all()
    assert Predictive(full_data(model), chains[False])(X, subsample_size=B)["y"].shape == (3, N)
    tree = bnn_ppl.to_arviz(mcmc)
    assert tree["posterior"]["net.0.weight"].shape == (1, 3, 3, 2)


def hierarchical(name, shape):
    scale = pyro.sample(f"{name}_scale", dist.HalfNormal(1.0))
    return dist.Normal(0.0, scale)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_prior_that_samples_scales(jit_compile):
    model = model_of(perceptron(), hierarchical)
    sites = SITES | {f"{site}_scale" for site in SITES}
    assert set(run(model, X, Y, jit_compile=jit_compile).get_samples()) == sites
    values = {site: torch.tensor(0.3 + 0.1 * i) for i, site in enumerate(sorted(sites - SITES))}
    trace = poutine.trace(poutine.condition(model, values)).get_trace(X)
    for site in SITES:
        assert (trace.nodes[site]["fn"].base_dist.scale == values[f"{site}_scale"]).all()


def test_a_prior_with_a_plate_of_its_own():
    def by_unit(name, shape):
        if name != "0.weight":
            return NORMAL
        with pyro.plate("units", shape[0]):
            scale = pyro.sample(f"{name}_scale", dist.HalfNormal(1.0))
        return dist.Normal(0.0, scale[:, None])

    model = model_of(perceptron(), by_unit)
    samples = run(model, X, Y).get_samples()
    assert samples["net.0.weight_scale"].shape == (3, 3)
    trace = poutine.trace(poutine.condition(model, {"net.0.weight_scale": torch.tensor([1.0, 2.0, 3.0])})).get_trace(X)
    assert trace.nodes["net.0.weight"]["fn"].base_dist.scale.tolist() == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    assert "units" in trace.nodes


def test_recurrent_modules():  # they keep a second list of their weights
    module = torch.nn.LSTM(2, 3)
    x = torch.randn(5, 1, 2)
    before = module(x)[0]
    trace = poutine.trace(lambda: random_torch_module("net", module, NORMAL)(x)[0]).get_trace()
    other = copy.deepcopy(module)
    other.load_state_dict({name: trace.nodes[f"net.{name}"]["value"] for name, _ in module.named_parameters()})
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], other(x)[0])
    assert torch.equal(module(x)[0], before)


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_guides_and_predictions(guide):
    model = model_of(perceptron(), hierarchical)
    guide = guide(model)
    losses = learned(model, guide, X, Y)
    assert np.mean(losses[-20:]) < np.mean(losses[:20])
    predicted = Predictive(model, guide=guide, num_samples=5)(X)
    assert predicted["y"].shape == (5, N)
    assert set(Predictive(model, num_samples=2)(X)) > SITES


def test_reparametrised_weights_and_scales():
    def prior(name, shape):
        return dist.Normal(0.0, pyro.sample(f"{name}_scale", dist.LogNormal(0.0, 1.0)))

    config = {"net.weight": LocScaleReparam(0.0), "net.weight_scale": TransformReparam()}
    model = poutine.reparam(model_of(torch.nn.Linear(2, 1, bias=False), prior), config=config)
    assert set(run(model, X, Y).get_samples()) == {"net.weight_decentered", "net.weight_scale_base"}
    trace = poutine.trace(model).get_trace(X)
    decentered, base = (trace.nodes[f"net.weight{end}"]["value"] for end in ("_decentered", "_scale_base"))
    torch.testing.assert_close(trace.nodes["net.weight"]["value"], decentered * base.exp())


def test_two_networks_and_scales_of_the_users_own():
    first, second = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)

    def model(x, y=None):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        one = random_torch_module("one", first, dist.Normal(0.0, scale))
        two = random_torch_module("two", second, priors.fan_in_normal(gain=scale))
        with pyro.plate("data", len(x), subsample_size=B) as rows:
            mean = two(torch.tanh(one(x[rows]))).squeeze(-1)
            pyro.sample("y", dist.Normal(mean, 0.5), obs=None if y is None else y[rows])

    samples = run(model, X, Y).get_samples()
    assert set(samples) == {"scale", "one.weight", "one.bias", "two.weight", "two.bias"}
    layout, evaluate = looked(model, X, Y)
    assert evaluate(layout.initial, layout.first_rows())[1]["scale"].abs() > 1e-3


def of_any_module(torch_module, x, y):
    net = random_torch_module("net", torch_module, priors.student_t(fan_in=True))
    with pyro.plate("data", len(x), subsample_size=B) as rows:
        pyro.sample("y", dist.Normal(net(x[rows]).squeeze(-1), 0.5), obs=y[rows])


def test_networks_go_to_other_processes(monkeypatch):
    net = random_torch_module("net", perceptron(), PRIORS)
    torch.testing.assert_close(pickle.loads(pickle.dumps(net))(X), net(X))
    kernel = pickle.loads(pickle.dumps(SGLD(partial(of_any_module, perceptron()), step_size=1e-3)))
    monkeypatch.setattr("pyro.infer.mcmc.api.mp.cpu_count", lambda: 8)
    mcmc = MCMC(kernel, 3, warmup_steps=1, num_chains=2, mp_context="fork", disable_progbar=True)
    mcmc.run(X, Y)
    assert type(mcmc.sampler).__name__ == "_MultiSampler"
    samples = mcmc.get_samples(group_by_chain=True)
    assert set(samples) == SITES
    assert all((value[0] != value[1]).all() for value in samples.values())


# Mistakes


def tied():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2))
    module[2].weight = module[0].weight
    return module


def lazy_buffers():
    return torch.nn.LazyBatchNorm1d(affine=False)


def partly_pyro():
    module = perceptron()
    module[2] = PyroModule[torch.nn.Linear](3, 1)
    return module


MODULES = {
    "shared": (tied, ["'0.weight'", "'2.weight'", "shared", "'net'", "forward"]),
    "lazy": (lambda: torch.nn.Sequential(torch.nn.LazyLinear(3)), ["'0.weight'", "'net'", "no shape", "one batch"]),
    "lazy buffer": (lazy_buffers, ["'running_mean'", "no shape", "one batch"]),
    "no parameters": (torch.nn.Tanh, ["'net'", "no parameters", "Tanh"]),
    "pyro": (lambda: PyroModule[torch.nn.Linear](2, 1), ["'net'", "PyroModule", "itself", "plain torch.nn"]),
    "partly pyro": (partly_pyro, ["PyroModule", "'2'"]),
    "function": (lambda: torch.tanh, ["torch_module", "'net'", "torch.nn.Module", "tanh"]),
}
WRONG = {
    "None": (None, ["'net'", "None", "pyro.module"]),
    "a number": (1.0, ["'0.weight'", "'net'", "1.0", "pyro.distributions"]),
    "a class": (dist.Normal, ["'0.weight'", "class", "pyro.distributions"]),
    "torch's": (torch.distributions.Normal(0.0, 1.0), ["'0.weight'", "Normal", "pyro.distributions"]),
    "returns a number": (lambda name, shape: 0.5, ["'0.weight'", "0.5", "returns"]),
    "a number in a dict": ({"2.*": 3}, ["'2.weight'", "3", "pyro.distributions"]),
    "discrete": ({"2.bias": dist.Poisson(1.0)}, ["'2.bias'", "'net'", "discrete", "Poisson", "continuous"]),
    "discrete inside": ({"2.bias": dist.Bernoulli(0.5).expand([1]).to_event(1)}, ["'2.bias'", "discrete"]),
    "batch shape": ({"0.*": dist.Normal(torch.zeros(4), 1.0)}, ["'0.weight'", "(4,)", "(3, 2)", "broadcast"]),
    "larger": ({"0.bias": dist.Normal(torch.zeros(2, 3), 1.0)}, ["'0.bias'", "(2, 3)", "(3,)"]),
    "event shape": ({"0.weight": dist.Dirichlet(torch.ones(3))}, ["'0.weight'", "(3,)", "(3, 2)"]),
    "event dim": ({"0.bias": NORMAL.expand([2, 3]).to_event(2)}, ["'0.bias'", "(2, 3)", "(3,)"]),
    "no match": ({"0.*": NORMAL, "1.weight": None}, ["'net'", "'1.weight'", "matches no parameter", *NAMES]),
    "case": ({"*.Weight": NORMAL}, ["'*.Weight'", "matches no parameter"]),
    "never reached": ({"*": NORMAL, "0.*": NORMAL}, ["'net'", "'0.*'", "earlier", "before"]),
}


@pytest.mark.parametrize("case", MODULES)
def test_modules_that_cannot_be_made_random(case):
    make, words = MODULES[case]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Lazy modules are a new feature")
        module = make()
    with pytest.raises(ValueError) as caught:
        random_torch_module("net", module, NORMAL)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("case", WRONG)
def test_priors_that_do_not_fit(case):
    prior, words = WRONG[case]
    with pytest.raises(ValueError) as caught:
        random_torch_module("net", perceptron(), prior)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("subsample_size", [B, None])
def test_a_network_made_inside_the_data_plate(subsample_size):
    module = perceptron()

    def model(x, y):
        with pyro.plate("data", len(x), subsample_size=subsample_size) as rows:
            net = random_torch_module("net", module, NORMAL)
            pyro.sample("y", dist.Normal(net(x[rows]).squeeze(-1), 0.5), obs=y[rows])

    for attempt in (lambda: model(X, Y), lambda: run(model, X, Y)):
        with pytest.raises(ValueError, match=r"'net' is made inside plate 'data'.*before the plate"):
            attempt()


def test_hosts_that_vectorise():
    model = model_of(perceptron(), NORMAL)
    guide = AutoDelta(model)
    guide(X, Y)
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    for attempt in (lambda: svi.step(X, Y), lambda: Predictive(model, num_samples=2, parallel=True)(X)):
        with pytest.raises(ValueError, match=r"inside plate.*vectorize_particles.*parallel=True"):
            attempt()


def test_a_network_for_each_turn_of_a_sequential_plate():
    module = perceptron()

    def model(x, y):
        total = sum(random_torch_module(f"net{i}", module, NORMAL)(x) for i in pyro.plate("members", 2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(total.squeeze(-1), 0.5), obs=y)

    names = {f"net{i}.{name}" for i in range(2) for name in NAMES}
    assert set(run(model, X, Y).get_samples()) == names
