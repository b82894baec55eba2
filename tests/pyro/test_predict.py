"""predict on Pyro's own sources and networks: MCMC, guides, modules, what vmap cannot do, and the random state."""

from functools import cache

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroSample
from torch.distributions import constraints

from bnn_ppl.pyro import SGHMC, SGLD, predict, priors, random_torch_module
from bnn_ppl.pyro.results import HoldParams

N, B, TEST = 40, 8, 13
RNG = np.random.default_rng(0)
X, X_TEST = (torch.tensor(RNG.normal(size=(n, 2)), dtype=torch.float32) for n in (N, TEST))
Y, Y_TEST = (x.sum(1) + 0.3 * torch.tensor(RNG.normal(size=len(x)), dtype=torch.float32) for x in (X, X_TEST))


@pytest.fixture(autouse=True)
def empty_store():
    yield
    pyro.clear_param_store()


def model(x, y=None, subsample_size=B):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x), subsample_size=subsample_size) as index:
        mean = pyro.deterministic("mean", x[index] @ w)
        pyro.sample("y", dist.Normal(mean, noise), obs=None if y is None else y[index])


def run(kernel, *args, draws=30, chains=2, **kwargs):
    pyro.set_rng_seed(0)
    mcmc = MCMC(kernel, draws, 10, num_chains=chains, disable_progbar=True)
    mcmc.run(*args, **kwargs)
    return mcmc


def sghmc(model, **settings):
    return SGHMC(model, **{"step_size": 0.02, "friction": 1.0} | settings)


@cache
def chains():
    return run(sghmc(model), X, Y)


def train(kind):
    pyro.set_rng_seed(0)
    guide = kind(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(100):
        svi.step(X, Y)
    return guide


def linear(draws, x=X_TEST):
    """Mean and standard deviation of an observation, from draws by site."""
    w, noise = (np.asarray(draws[name], np.float64) for name in ("w", "noise"))
    mean = np.einsum("nk,...k->...n", x, w)
    total = (mean**2 + np.square(noise)[..., None]).reshape(-1, len(x)).mean(0)
    mean = mean.reshape(-1, len(x)).mean(0)
    return mean, np.sqrt(total - mean**2)


@pytest.mark.parametrize(
    ("kernel", "kwargs"),
    [
        (lambda: sghmc(model), {}),
        (lambda: sghmc(model, batch_size=B), {"subsample_size": None}),
        (lambda: NUTS(model, max_tree_depth=3), {"subsample_size": None}),
    ],
)
def test_mcmc(kernel, kwargs):
    mcmc = run(kernel(), X, Y, draws=10, **kwargs)
    found = predict(mcmc, X_TEST, Y_TEST, functions=True, row_batch_size=5, **kwargs)
    draws = {name: value.numpy() for name, value in mcmc.get_samples(group_by_chain=True).items()}
    mean, sd = linear(draws)
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["sd"], sd, rtol=1e-4)
    np.testing.assert_allclose(found["functions"], np.einsum("nk,cdk->cdn", X_TEST, draws["w"]), rtol=1e-4, atol=1e-5)
    assert found["draw_log_density"].shape == (2, 10)
    same = predict(mcmc.get_samples(), X_TEST, Y_TEST, model=model, functions=True, row_batch_size=5, **kwargs)
    xr.testing.assert_allclose(found["log_density"], same["log_density"])
    assert same["functions"].shape == (1, 20, TEST)


def test_another_model():
    """In this one the noise is known."""

    def quiet(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(2 * x @ w, 0.1))

    found = predict(chains(), X_TEST, model=quiet)
    mean = linear(chains().get_samples())[0]
    np.testing.assert_allclose(found["mean"], 2 * mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["sd"] ** 2, found["function_sd"] ** 2 + 0.01, rtol=1e-4)


@pytest.mark.parametrize("kind", [AutoMultivariateNormal, AutoDelta])
def test_automatic_guides(kind):
    guide = train(kind)
    found = predict(guide, X_TEST, Y_TEST, model=model, num_draws=200, functions=True, seed=3)
    pyro.set_rng_seed(1)
    several = [guide(X, Y) for _ in range(200)]
    draws = {name: torch.stack([draw[name].detach() for draw in several]) for name in ("w", "noise")}
    mean, sd = linear(draws)
    function_sd = np.einsum("nk,sk->sn", X_TEST, draws["w"]).std(0)
    assert np.all(np.abs(found["mean"] - mean) <= 5 * function_sd / 10 + 1e-5)  # 200 draws of each
    np.testing.assert_allclose(found["function_sd"], function_sd, rtol=0.3, atol=1e-4)
    np.testing.assert_allclose(found["sd"], sd, rtol=0.2)
    assert (function_sd.max() > 1e-3) == (kind is not AutoDelta)
    assert found["functions"].shape == (1, 200, TEST)


def test_draws_of_a_guide_are_those_of_the_seed():
    guide = train(AutoNormal)
    arguments = {"model": model, "num_draws": 9, "functions": True}
    first = predict(guide, X_TEST, **arguments)
    for sizes in ({"draw_batch_size": 2}, {"row_batch_size": 4, "draw_batch_size": 7}):
        xr.testing.assert_allclose(predict(guide, X_TEST, **arguments, **sizes), first, rtol=1e-5)
    other = predict(guide, X_TEST, **arguments, seed=1)
    assert not (other["functions"] == first["functions"]).any()
    assert len(np.unique(first["functions"][0, :, 0])) == 9
    assert predict(guide, X_TEST, model=model).attrs["num_draws"] == 1000


def test_guides_written_by_hand():
    def hand_written(x, y=None, subsample_size=B):
        location = pyro.param("location", torch.zeros(2))
        pyro.sample("w", dist.Normal(location, 0.1).to_event(1))
        pyro.sample("noise", dist.Delta(pyro.param("size", torch.tensor(0.5), constraint=constraints.positive)))

    values = {"location": torch.tensor([1.0, -1.0]), "size": torch.tensor(0.3)}
    found = predict(hand_written, X_TEST, model=model, params=values, num_draws=500)
    np.testing.assert_allclose(found["mean"], X_TEST[:, 0] - X_TEST[:, 1], atol=5 * 0.1 * 3 / 500**0.5)
    np.testing.assert_allclose(found["function_sd"], 0.1 * np.linalg.norm(X_TEST, axis=1), rtol=0.2)
    np.testing.assert_allclose(found["sd"] ** 2, found["function_sd"] ** 2 + 0.09, rtol=1e-4)
    for name, value in values.items():
        pyro.get_param_store()[name] = value
    xr.testing.assert_allclose(predict(hand_written, X_TEST, model=model, num_draws=500), found)


@pytest.mark.parametrize(
    "kind", [AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal]
)
def test_params_of_modules(kind):
    """Also plain parameters, which modules read without asking; what they hold, and the store, stays."""
    guide = train(kind)
    values = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    before = {name: value.detach().clone() for name, value in guide.named_parameters()}
    shifted = {name: value + 0.5 if name.split(".")[1].startswith("loc") else value for name, value in values.items()}
    for scheme in ("ensemble", "deterministic"):
        arguments = {"model": model, "scheme": scheme} | ({"num_draws": 20} if scheme == "ensemble" else {})
        plain = predict(guide, X_TEST, **arguments)
        same = predict(guide, X_TEST, params=values, **arguments)
        xr.testing.assert_allclose(plain, same)
        found = predict(guide, X_TEST, params=shifted, **arguments)
        np.testing.assert_allclose(found["mean"] - plain["mean"], 0.5 * X_TEST.sum(1), rtol=1e-3, atol=1e-5)
        xr.testing.assert_identical(predict(guide, X_TEST, **arguments), plain)
    for name, value in guide.named_parameters():
        assert torch.equal(value, before[name])
        assert value.requires_grad
    for name, value in pyro.get_param_store().items():
        assert torch.equal(value, values[name])
    with pytest.raises(KeyError), HoldParams(shifted):  # also after an error
        guide(X, Y)["no site"]
    for name, value in guide.named_parameters():
        assert torch.equal(value, before[name])


def test_guides_that_are_not_trained():
    with pytest.raises(ValueError, match="guide AutoNormal has not been trained"):
        predict(AutoNormal(model), X_TEST, model=model)


def test_chains_that_cannot_predict():
    mcmc = MCMC(sghmc(model), 5, 5, disable_progbar=True)
    with pytest.raises(ValueError, match=r"mcmc has no draws yet: call mcmc\.run first"):
        predict(mcmc, X_TEST)
    kernel = SGLD(potential_fn=lambda z: (z["w"] ** 2).sum(), step_size=0.1)
    mcmc = MCMC(kernel, 20, 0, disable_progbar=True, initial_params={"w": torch.zeros(2)})
    mcmc.run()
    with pytest.raises(ValueError, match=r"a chain of a potential_fn brings no model, so give the one .* as model="):
        predict(mcmc, X_TEST)

    def known_noise(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5))

    found = predict(mcmc, X_TEST, model=known_noise)
    np.testing.assert_allclose(found["mean"], X_TEST @ mcmc.get_samples()["w"].mean(0), rtol=1e-4, atol=1e-5)


def test_known_responses_of_a_chain():
    """Sites that the chain did not observe are no responses."""

    def simulates(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)
            if y is None:
                pyro.sample("simulated", dist.Normal(x @ w, 0.5))

    mcmc = run(NUTS(simulates, max_tree_depth=3), X, Y, draws=5)
    mean = X_TEST @ mcmc.get_samples()["w"].mean(0)
    np.testing.assert_allclose(predict(mcmc, X_TEST)["mean"], mean, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"observed sites \['y', 'simulated'\]"):
        predict(mcmc.get_samples(), X_TEST, model=simulates)


def test_chains_of_minibatches():
    """The kernel then shows no model to the host, for nobody holds all data."""

    def streamed(x, y=None):
        shift = pyro.param("shift", torch.tensor(0.5))
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", N, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(x @ w + shift, 0.5), obs=y)

    batches = [(X[i : i + B], Y[i : i + B]) for i in range(0, N, B)]
    kernel = sghmc(streamed, minibatches=batches)
    mcmc = MCMC(kernel, 6, 2, disable_progbar=True)
    with pytest.warns(UserWarning, match="param sites"):
        mcmc.run()
    pyro.get_param_store()["shift"] = torch.tensor(-3.0)
    found = predict(mcmc, X_TEST, Y_TEST, row_batch_size=5)
    mean = X_TEST @ mcmc.get_samples()["w"].mean(0) + 0.5
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-4, atol=1e-5)


def test_param_sites():
    def shifted(x, y=None):
        shift = pyro.param("shift", torch.tensor(0.7))
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x), subsample_size=B) as index:
            pyro.sample("y", dist.Normal(x[index] @ w + shift, 0.5), obs=None if y is None else y[index])

    with pytest.warns(UserWarning, match="param sites"):
        mcmc = run(sghmc(shifted), X, Y, draws=5)
    pyro.get_param_store()["shift"] = torch.tensor(-3.0)
    mean = X_TEST @ mcmc.get_samples()["w"].mean(0)
    np.testing.assert_allclose(predict(mcmc, X_TEST)["mean"], mean + 0.7, rtol=1e-4, atol=1e-5)
    given = {"shift": torch.tensor(2.0)}
    np.testing.assert_allclose(predict(mcmc, X_TEST, params=given)["mean"], mean + 2, rtol=1e-4, atol=1e-5)
    stored = predict(mcmc.get_samples(), X_TEST, model=shifted)
    np.testing.assert_allclose(stored["mean"], mean - 3, rtol=1e-4, atol=1e-5)


class Perceptron(PyroModule):
    """PyroSample weights, called outside the data plate as Pyro's modules have to be."""

    def __init__(self):
        super().__init__()
        self.layer = PyroModule[torch.nn.Linear](2, 3)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
        self.layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    def forward(self, x, y=None):
        plate = pyro.plate("data", len(x), subsample_size=min(B, len(x)))
        with plate as index:
            pass
        logits = self.layer(x[index])
        with plate:
            pyro.sample("y", dist.Categorical(logits=logits), obs=None if y is None else y[index])


@pytest.mark.parametrize("kind", ["PyroModule", "random_torch_module"])
def test_networks(kind):
    labels = torch.tensor(RNG.integers(0, 3, TEST))
    layer = torch.nn.Linear(2, 3)

    def lifted(x, y=None):
        net = random_torch_module("layer", layer, priors.fan_in_normal())
        with pyro.plate("data", len(x), subsample_size=min(B, len(x))) as index:
            pyro.sample("y", dist.Categorical(logits=net(x[index])), obs=None if y is None else y[index])

    weights = torch.tensor(RNG.normal(size=(5, 3, 2)), dtype=torch.float32)
    bias = torch.tensor(RNG.normal(size=(5, 3)), dtype=torch.float32)
    found = predict(
        {"layer.weight": weights, "layer.bias": bias},
        X_TEST,
        labels,
        model=Perceptron() if kind == "PyroModule" else lifted,
        row_batch_size=5,
        functions=True,
    )
    p = torch.stack([(X_TEST @ weights[i].T + bias[i]).softmax(-1) for i in range(5)]).numpy()
    np.testing.assert_allclose(found["functions"][0], p, rtol=1e-5)
    np.testing.assert_allclose(found["log_density"], np.log(p[:, np.arange(TEST), labels].mean(0)), rtol=1e-5)


def test_one_hot_observations():
    def response(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.OneHotCategorical(logits=x @ w), obs=y)

    w, labels = torch.tensor(RNG.normal(size=(5, 2, 3)), dtype=torch.float32), torch.tensor(RNG.integers(0, 3, TEST))
    one_hot = torch.nn.functional.one_hot(labels, 3).float()
    found = predict({"w": w}, X_TEST, one_hot, model=response, row_batch_size=5, functions=True)
    p = torch.stack([(X_TEST @ w[i]).softmax(-1) for i in range(5)]).numpy()
    assert found["functions"].dims == ("chain", "draw", "row", "class")
    assert found["mean_entropy"].dims == found["observed"].dims == ("row",)
    np.testing.assert_allclose(found["functions"][0], p, rtol=1e-5)
    np.testing.assert_array_equal(found["observed"], labels)
    np.testing.assert_allclose(found["log_density"], np.log(p[:, np.arange(TEST), labels].mean(0)), rtol=1e-5)


@pytest.mark.parametrize("reads", [False, True])
def test_models_that_vmap_cannot_run(reads):
    """They run for one draw after another, with the same results; others run once for a batch of draws."""
    calls = []

    def model(x, y=None):
        calls.append(len(x))
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        if reads and float(noise) < 0:
            raise AssertionError
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    draws = chains().get_samples()
    found = predict(draws, X_TEST, Y_TEST, model=model, draw_batch_size=10)
    np.testing.assert_allclose(found["mean"], linear(draws)[0], rtol=1e-4, atol=1e-5)
    assert len(calls) == 4 + (1 + 60 if reads else 6)


def test_randomness_of_the_models_own():
    class Dropped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)

        def forward(self, x):
            w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(self.drop(x) @ w, 1.0))

    module = Dropped()
    with pytest.raises(ValueError, match=r"another distribution in a second run.*dropout.*module\.eval\(\)"):
        predict(chains().get_samples(), X_TEST, model=module)
    predict(chains().get_samples(), X_TEST, model=module.eval())


def test_nothing_is_left_behind():
    """Neither in the random state, nor in settings, nor a graph of gradients."""
    guide = train(AutoNormal)
    state = torch.get_rng_state()
    weights = {name: value.clone().requires_grad_() for name, value in chains().get_samples().items()}
    predict(weights, X_TEST, Y_TEST, model=model)
    predict(guide, X_TEST, Y_TEST, model=model, num_draws=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    with poutine.trace() as recorder:
        predict(guide, X_TEST, Y_TEST, model=model, num_draws=3)
    assert set(recorder.trace.nodes) == set()
    with pytest.raises(ValueError, match="subsample_size does not match"):
        pyro.plate("data", 5, subsample_size=3, subsample=torch.arange(2))


def test_masked_rows_have_no_density():
    def masked(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)), poutine.mask(mask=x[:, 0] > 0):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    found = predict(chains().get_samples(), X_TEST, Y_TEST, model=masked)
    np.testing.assert_array_equal(found["log_density"] == 0, X_TEST[:, 0] <= 0)


def test_numpy_arguments():
    found = predict(chains(), X_TEST.numpy(), Y_TEST.numpy(), model=as_tensors, row_batch_size=5)
    np.testing.assert_allclose(found["mean"], predict(chains(), X_TEST)["mean"], rtol=1e-6)


def as_tensors(x, y):
    model(torch.as_tensor(x), torch.as_tensor(y))
