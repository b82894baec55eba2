"""Local reparameterisation in Pyro's SVI; mirrors tests/numpyro/test_local_reparameterization.py."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.optim import SGD, Adam, ExponentialLR

from bnn_ppl.pyro import (
    AutoVarianceNetwork,
    AutoVariationalDropout,
    local_reparameterization,
    predict,
    random_torch_module,
)
from tests import dropout, local


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def network(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([6, 20]).to_event(2))
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([20]).to_event(1))
    v = pyro.sample("v", dist.Normal(0.0, 0.2).expand([20]).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    shift = pyro.param("shift", torch.tensor(0.3))
    pyro.factor("small", -w.square().sum())
    with pyro.plate("data", len(x), subsample_size=30) as rows, poutine.scale(scale=0.5):
        f = pyro.deterministic("f", torch.tanh(x[rows] @ w + b) @ v + shift)
        with poutine.mask(mask=f > -1e9):
            pyro.sample("y", dist.Normal(f, noise), obs=None if y is None else y[rows])


quiet = poutine.condition(network, {"noise": torch.tensor(0.5)})


def written(x, y=None):
    for name, shape in (("w", (6, 20)), ("b", (20,)), ("v", (20,))):
        loc = pyro.param(f"{name}_loc", torch.linspace(-1, 1, int(np.prod(shape))).reshape(shape))
        scale = pyro.param(f"{name}_scale", torch.full(shape, 0.1), constraint=dist.constraints.positive)
        pyro.sample(name, dist.Normal(loc, scale).to_event(len(shape)))


ARGS = torch.as_tensor(local.X), torch.as_tensor(local.Y)


def test_nothing_changes_without_noise():
    """Of narrow normals, the loss and each site of the trace are those of the model itself."""
    guide = AutoNormal(network, init_scale=1e-9)
    guide(*ARGS)
    both = local_reparameterization(network, guide)
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        found = []
        for pair in ((network, guide), both):
            pyro.set_rng_seed(1)
            found.append(elbo.loss(*pair, *ARGS))
        assert found[1] == pytest.approx(found[0], rel=1e-6)
    guided = poutine.trace(both[1]).get_trace(*ARGS)
    traces = []
    for model in (network, both[0]):
        pyro.set_rng_seed(2)
        traces.append(poutine.trace(poutine.replay(model, guided)).get_trace(*ARGS).nodes)
    plain, changed = traces
    assert set(plain) == set(changed)
    for name, site in plain.items():
        if site["type"] == "sample":
            assert site["scale"] == changed[name]["scale"]
            assert site["cond_indep_stack"] == changed[name]["cond_indep_stack"]
            assert type(changed[name]["value"]) is torch.Tensor
            torch.testing.assert_close(changed[name]["value"], site["value"], rtol=1e-6, atol=1e-8)


def test_particles_together():
    """The loss of a linear model, whose expectation and variance over rows of independent noise are known."""

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([6, 1]).to_event(2))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Normal((x @ w).reshape(*w.shape[:-3], len(x)), 1.0), obs=y)

    guide = AutoNormal(model, init_scale=0.3)
    guide(*ARGS)
    particles = 2000
    elbo = TraceMeanField_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    found = elbo.loss(*local_reparameterization(model, guide), *ARGS)
    mean = guide.median()["w"].numpy()
    residual = local.Y - (local.X @ mean)[:, 0]
    variance = 0.09 * (local.X**2).sum(1)
    divergence = 0.5 * (mean**2 + 0.09 - 1 - np.log(0.09)).sum()
    expected = 0.5 * (residual**2 + variance + np.log(2 * np.pi)).sum() + divergence
    error = np.sqrt((residual**2 * variance + 0.5 * variance**2).sum() / particles)
    assert abs(found - expected) < 4 * error


def test_predictive_takes_the_model():
    model, _ = local_reparameterization(network, AutoNormal(network))
    assert Predictive(model, num_samples=2)(ARGS[0])["y"].shape == (2, 30)


GUIDES = {
    "AutoNormal": lambda: AutoNormal(quiet),
    "by hand": lambda: written,
}


@pytest.mark.parametrize("name", GUIDES)
def test_same_expectation_with_less_variance(name):
    guide = GUIDES[name]()
    guide(*ARGS)
    found = {}
    for kind, pair in {"plain": (quiet, guide), "local": local_reparameterization(quiet, guide)}.items():
        losses, slopes = [], []
        for _ in range(1000):
            with poutine.trace(param_only=True) as recorder:
                loss = TraceMeanField_ELBO().differentiable_loss(*pair, *ARGS)
            (scale,) = [
                site["value"]
                for param, site in recorder.trace.nodes.items()
                if param.endswith(("scales.w", "w_scale")) and site["type"] == "param"
            ]
            slopes.append(torch.autograd.grad(loss, scale.unconstrained())[0].detach())
            losses.append(loss.item())
        found[kind] = torch.tensor(losses), torch.stack(slopes)
    plain, changed = (found[kind][0] for kind in ("plain", "local"))
    error = ((plain.var() + changed.var()) / 1000) ** 0.5
    assert abs(plain.mean() - changed.mean()) < 4 * error
    slopes = {kind: values[1] for kind, values in found.items()}
    errors = (sum(s.var(0) for s in slopes.values()) / 1000).sqrt()
    assert ((slopes["plain"].mean(0) - slopes["local"].mean(0)) / errors).abs().max() < 4.5
    assert slopes["local"].var(0).sum() < 0.5 * slopes["plain"].var(0).sum()


def regression(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


@pytest.mark.parametrize("guide", [AutoNormal, AutoVariationalDropout])
def test_conjugate_optimum(guide):
    data = torch.as_tensor(dropout.X), torch.as_tensor(dropout.Y)
    guide = guide(regression, init_loc_fn=init_to_value(values={"w": torch.as_tensor(dropout.START)}))
    optimiser = ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.03}, "gamma": 0.998})
    svi = SVI(*local_reparameterization(regression, guide), optimiser, TraceMeanField_ELBO())
    for _ in range(3000):
        svi.step(*data)
        optimiser.step()
    mean, sd = dropout.conjugate()
    np.testing.assert_allclose(guide.median()["w"], mean, atol=0.1 * sd.min())
    level = dist.Normal(0.0, 1.0).cdf(torch.tensor(1.0))
    high = guide.quantiles([float(level)])["w"][0]
    np.testing.assert_allclose(high - guide.median()["w"], sd, rtol=0.1)
    predicted = predict(guide, data[0], model=regression, num_draws=500)["mean"].values
    np.testing.assert_allclose(predicted, dropout.X @ mean, atol=0.1)


def test_inputs_of_zero():
    """No noise, and finite gradients, where a root has none."""
    guide = AutoVarianceNetwork(regression)
    args = torch.zeros(4, 3), torch.zeros(4)
    guide(*args)
    loss = TraceMeanField_ELBO().differentiable_loss(*local_reparameterization(regression, guide), *args)
    variance = guide.sigmas.w.detach() ** 2
    divergence = -0.5 * (1 + variance.log() - variance).sum()
    assert loss.item() == pytest.approx(float(divergence) + 2 * np.log(2 * np.pi), rel=1e-9)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in guide.parameters())


def test_a_network_of_torch_trains():
    def model(x, y=None):
        prior = lambda name, shape: dist.Normal(0.0, 1.0)  # noqa: E731
        net = random_torch_module("net", torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Tanh()), prior)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x).mean((1, 2, 3)), 1.0), obs=y)

    svi = SVI(*local_reparameterization(model, AutoNormal(model)), Adam({"lr": 0.1}), TraceMeanField_ELBO())
    assert all(np.isfinite(svi.step(torch.randn(8, 1, 6, 6), torch.ones(8))) for _ in range(5))


@pytest.mark.parametrize("guide", [AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal])
def test_a_guide_without_normals_is_refused(guide):
    svi = SVI(*local_reparameterization(regression, guide(regression)), SGD({"lr": 0.0}), Trace_ELBO())
    with pytest.raises(ValueError, match=r"guide draws no site from a normal of its own, .*\s*such as AutoNormal"):
        svi.step(torch.as_tensor(dropout.X), torch.as_tensor(dropout.Y))


def test_a_model_without_layers_is_refused():
    def model(y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=y)

    svi = SVI(*local_reparameterization(model, AutoNormal(model)), SGD({"lr": 0.0}), Trace_ELBO())
    with pytest.raises(ValueError, match=r"no layer with one of the sites \['w'\] that local_reparameterization knows"):
        svi.step(torch.tensor(0.0))


def test_a_site_in_several_layers_is_told():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 3]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x @ w @ w).sum(-1), 1.0), obs=y)

    svi = SVI(*local_reparameterization(model, AutoNormal(model)), SGD({"lr": 0.0}), Trace_ELBO())
    with pytest.warns(UserWarning, match=r"the sites \['w'\] are in several layers"):
        svi.step(torch.as_tensor(dropout.X), torch.as_tensor(dropout.Y))
