"""Averages where models and guides have parameters, modules and arguments of their own, on Pyro."""

import io
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import iterated, spline
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from pyro.nn import PyroModule
from pyro.optim import SGD, LambdaLR

from bnn_ppl import to_arviz
from bnn_ppl.pyro import FGE, HWASVI, SWA, SWAG, predict
from bnn_ppl.schedules import CosineRestarts

X = torch.linspace(-1.0, 1.0, 40, dtype=torch.float64).reshape(20, 2)
Y = X @ torch.tensor([1.5, -0.5], dtype=torch.float64)


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def with_module(net, x, y=None):
    """A network of plain torch that SVI learns, and a random offset."""
    pyro.module("net", net)
    offset = pyro.sample("offset", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(net(x).squeeze(-1) + offset, 1.0), obs=y)


def module_model(seed=0):
    torch.manual_seed(seed)
    net = torch.nn.Linear(2, 1).double()
    return net, lambda x, y=None: with_module(net, x, y)


def linear(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)


def trained(cls, model, guide, steps=12, **settings):
    svi = cls(model, guide, SGD({"lr": 0.01}), Trace_ELBO(), start=4, cycle_length=2, **settings)
    for _ in range(steps):
        svi.step(X, Y)
    return svi


class WithParameters(PyroModule):
    """A guide whose law is made of parameters as they are, without a copy."""

    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.scale = torch.nn.Parameter(torch.full((2,), 0.3, dtype=torch.float64))

    def forward(self, x, y=None):
        pyro.sample("w", dist.Normal(self.loc, self.scale).to_event(1))


@pytest.mark.parametrize("guide", [lambda: AutoDiagonalNormal(linear, init_scale=0.3), WithParameters])
def test_laws_that_hold_parameters_themselves(guide):
    svi = trained(HWASVI, linear, guide(), covariance="parameters")
    tree = to_arviz(svi, model_args=(X, Y), num_samples=5)
    loc, scale = (value.detach() for value in svi.averaged_params().values())
    w = torch.tensor(tree["posterior"]["w"].values[0])
    log_p = dist.Normal(0.0, 1.0).log_prob(w).sum(-1) + dist.Normal(w @ X.T, 1.0).log_prob(Y).sum(-1)
    expected = log_p - dist.Normal(loc, scale).log_prob(w).sum(-1)
    np.testing.assert_allclose(tree["sample_stats"]["elbo"].values[0], expected, rtol=1e-9)
    assert not torch.allclose(loc, next(iter(svi.guide.parameters())))
    pyro.clear_param_store()
    law = trained(HWASVI, linear, guide(), covariance="iterate").averaged_moments()  # whose locations move
    assert all((variance > 0).all() for _, variance in law.values())


@pytest.mark.parametrize(
    "make",
    [partial(AutoIAFNormal, hidden_dim=[8]), lambda model: AutoNormalizingFlow(model, partial(iterated, 1, spline))],
)
def test_elbo_of_an_averaged_flow(make):
    """The averages have left its parameters when the density is asked for: its cache has that of the draw."""
    guide = make(linear)
    svi = HWASVI(linear, guide, SGD({"lr": 0.01}), Trace_ELBO(), start=4, cycle_length=2, covariance="parameters")
    x, y = X.float(), Y.float()
    for _ in range(12):
        svi.step(x, y)
    tree = to_arviz(svi, model_args=(x, y), num_samples=5)
    w = torch.tensor(tree["posterior"]["w"].values[0])
    log_p = dist.Normal(0.0, 1.0).log_prob(w).sum(-1) + dist.Normal(w @ x.T, 1.0).log_prob(y).sum(-1)

    def elbo():
        return [float(p - guide.get_posterior().log_prob(value).detach()) for p, value in zip(log_p, w, strict=True)]

    at_the_end = elbo()
    for name, value in svi.averaged_params().items():
        guide.get_parameter(name.replace("$$$", ".").removeprefix(f"{type(guide).__name__}.")).data = value
    found = tree["sample_stats"]["elbo"].values[0]
    np.testing.assert_allclose(found, elbo(), rtol=1e-5)
    assert not np.allclose(found, at_the_end, rtol=1e-3)


def test_median_of_averaged_parameters():
    """Not a draw: the guide has a scale of 1."""
    svi = trained(HWASVI, linear, AutoNormal(linear, init_scale=1.0), covariance="parameters")
    averaged = svi.averaged_guide()
    expected = svi.averaged_params()["AutoNormal.locs.w"]
    torch.testing.assert_close(averaged.median(X, Y)["w"], expected)
    found = predict(averaged, X, model=linear, scheme="deterministic")["mean"].values
    np.testing.assert_allclose(found, (X @ expected).numpy())


def test_averaged_parameters_of_the_model():
    """Predictions and log likelihoods have the averages, not what the module has after the last step."""
    net, model = module_model()
    svi = trained(HWASVI, model, AutoDelta(model))
    params, last = svi.averaged_params(), net.weight.detach().clone()
    weight, bias = params["net$$$weight"], params["net$$$bias"]
    assert not torch.allclose(weight, last)
    mean = (X @ weight.T + bias).squeeze(-1).detach()
    offset = svi.averaged_guide().median(X, Y)["offset"]
    found = predict(svi.averaged_guide(), X, model=model, scheme="deterministic")["mean"].values
    np.testing.assert_allclose(found, (mean + offset).numpy())
    tree = to_arviz(svi, model_args=(X, Y), num_samples=3, log_likelihood=True)
    draws = torch.as_tensor(tree["posterior"]["offset"].values[0])
    expected = dist.Normal(mean + draws[:, None], 1.0).log_prob(Y)
    np.testing.assert_allclose(tree["log_likelihood"]["y"].values[0], expected.numpy())
    torch.testing.assert_close(net.weight.detach(), last)


def test_snapshots_with_parameters_of_the_model():
    _, model = module_model()
    svi = trained(FGE, model, AutoDelta(model))
    with pytest.raises(ValueError, match=r"param sites \['net\$\$\$bias', 'net\$\$\$weight'\] .* snapshot_params"):
        svi.snapshots(X, Y)


def test_resume_of_a_module():
    _, model = module_model()
    svi = trained(SWA, model, AutoDelta(model), steps=5)
    kept = io.BytesIO()
    torch.save(svi.state_dict(), kept)
    expected = [svi.step(X, Y) for _ in range(4)]
    averages = svi.averaged_params()
    pyro.clear_param_store()
    _, other = module_model(seed=7)
    again = SWA(other, AutoDelta(other), SGD({"lr": 0.01}), Trace_ELBO(), start=4, cycle_length=2)
    kept.seek(0)
    again.load_state_dict(torch.load(kept, weights_only=False))
    assert [again.step(X, Y) for _ in range(4)] == expected
    for name, value in again.averaged_params().items():
        assert torch.equal(value, averages[name])


@pytest.mark.parametrize(("cls", "settings"), [(SWAG, {"rank": 3}), (FGE, {"num_snapshots": 3})])
def test_resume_with_other_settings(cls, settings):
    svi = trained(cls, linear, AutoDelta(linear), **settings)
    (name,) = settings
    other = cls(linear, AutoDelta(linear), SGD({"lr": 0.01}), Trace_ELBO(), start=4, cycle_length=2, **{name: 5})
    with pytest.raises(ValueError, match=f"a run with {name}=3, and this object has {name}=5"):
        other.load_state_dict(svi.state_dict())


@pytest.mark.parametrize(
    ("state", "got"),
    [({"a": 1}, r"a dict of \['a'\]"), ({"settings": {}, "own": {}}, r"a dict of \['settings', 'own'\]"), (3, "int")],
)
@pytest.mark.parametrize("cls", [HWASVI, FGE])
def test_resume_from_something_else(cls, state, got):
    svi = trained(cls, linear, AutoDelta(linear), steps=1)
    before = svi.state_dict()
    with pytest.raises(ValueError, match=rf"state must be what state_dict\(\) returned, got {got}: save svi\.state_d"):
        svi.load_state_dict(state)
    svi.load_state_dict(before)


def mixed(x, y=None):
    pyro.sample("s", dist.LogNormal(0.0, 1.0))
    linear(x, y)


def test_moments_have_the_names_of_the_sites():
    """Those of auxiliary sites too, in unconstrained coordinates; a vector has its own. After a state as well."""
    guide = AutoGuideList(mixed)
    guide.append(AutoNormal(poutine.block(mixed, hide=["w"])))
    guide.append(AutoDiagonalNormal(poutine.block(mixed, hide=["s"])))
    svi = trained(HWASVI, mixed, guide)
    (loc,) = (value for name, value in svi.averaged_params().items() if name.endswith("locs.s"))
    moments = svi.averaged_moments()
    assert [name for name in moments if not name.startswith("_")] == ["s"]
    assert len(moments) == 2
    assert float(moments["s"][0]) == pytest.approx(float(loc), rel=1e-6)
    again = HWASVI(mixed, guide, SGD({"lr": 0.01}), Trace_ELBO(), start=4, cycle_length=2)
    again.load_state_dict(svi.state_dict())
    assert list(again.averaged_moments()) == list(moments)


def scales(x, y=None):
    """A guide without location parameters."""
    scale = pyro.param("scale", torch.ones(2, dtype=x.dtype), constraint=dist.constraints.positive)
    pyro.sample("w", dist.Normal(torch.zeros(2, dtype=x.dtype), scale).to_event(1))


def test_guide_without_location_parameters():
    """Its variances are averaged; a variance of locations it has not."""
    with pytest.raises(ValueError, match=r"moves the location of the sites \['w'\], and covariance='iterate'"):
        trained(HWASVI, linear, scales, steps=1, covariance="iterate")
    pyro.clear_param_store()
    mean, variance = trained(HWASVI, linear, scales, covariance="mixture").averaged_moments()["w"]
    assert not mean.any()
    assert (variance > 0.1).all()


def test_guide_without_median():
    svi = trained(HWASVI, linear, scales, covariance="parameters")
    with pytest.raises(ValueError, match="the guide scales, whose parameters were averaged, has no median"):
        predict(svi.averaged_guide(), X, model=linear, scheme="deterministic")


def test_snapshots_for_arviz():
    svi = trained(FGE, linear, AutoDelta(linear), steps=8, num_snapshots=2)
    tree = to_arviz(svi, model_args=(X, Y))
    np.testing.assert_array_equal(tree["posterior"]["w"].values[0], svi.snapshots(X, Y)["w"].numpy())
    np.testing.assert_array_equal(tree["sample_stats"]["averaging_weight"].values, [[0.5, 0.5]])


def test_guide_that_reads_its_arguments():
    def local(x, y=None):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(x, y=None):
        shift = pyro.param("shift", torch.zeros((), dtype=x.dtype))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(shift + x[:, 0], 0.1))

    with pytest.raises(ValueError, match="site 'z' of the guide has a law that depends on the arguments of the guide"):
        trained(HWASVI, local, guide, steps=1)


def test_guide_that_cannot_run_without_numbers():
    def model(x, y=None):
        scale = pyro.sample("scale", dist.HalfNormal(torch.ones((), dtype=x.dtype)))
        pyro.sample("w", dist.MultivariateNormal(torch.zeros(2, dtype=x.dtype), scale * torch.eye(2, dtype=x.dtype)))

    def guide(x, y=None):
        loc = pyro.param("loc", torch.zeros((), dtype=x.dtype))
        scale = pyro.sample("scale", dist.LogNormal(loc, 0.1))
        pyro.sample("w", dist.MultivariateNormal(torch.zeros(2, dtype=x.dtype), scale * torch.eye(2, dtype=x.dtype)))

    with pytest.raises(ValueError, match=r"laws from draws of other sites.*covariance='parameters'"):
        trained(HWASVI, model, guide, steps=1)


def test_parameter_that_comes_late():
    steps = []

    def model(x, y=None):
        steps.append(1)
        if len(steps) > 4:
            pyro.param("late", torch.zeros((), dtype=x.dtype))
        linear(x, y)

    with pytest.raises(ValueError, match=r"param sites \['late'\] came after the first step"):
        trained(SWA, model, AutoDelta(linear))


@pytest.mark.parametrize("cls", [HWASVI, SWAG, FGE])
def test_batch_normalisation_is_left_alone(cls):
    buffers = []
    for make in (SVI, cls):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)).double()

        def model(x, y=None, net=net):
            with_module(net, x, y)

        settings = {} if make is SVI else {"start": 1, "cycle_length": 1} | ({"rank": 2} if cls is SWAG else {})
        svi = make(model, AutoDelta(model), SGD({"lr": 0.01}), Trace_ELBO(), **settings)
        for _ in range(3):
            svi.step(X, Y)
        if make is not SVI and cls is not FGE:
            svi.averaged_guide().median(X, Y)
        buffers.append({name: value.clone() for name, value in net.named_buffers()})
    for name, value in buffers[0].items():
        assert torch.equal(value, buffers[1][name]), name


@pytest.mark.parametrize("covariance", ["mixture", "parameters", "low_rank"])
def test_parameter_store_is_left_alone(covariance):
    """After it was cleared for another run, an averaged guide works, and leaves nothing there."""
    svi = trained(HWASVI, linear, AutoNormal(linear), covariance=covariance, rank=2)
    pyro.clear_param_store()
    averaged = svi.averaged_guide()
    averaged.median(X, Y)
    predict(averaged, X, model=linear, num_draws=3)
    Predictive(averaged, num_samples=2)(X, Y)
    assert not list(pyro.get_param_store().keys())


def test_particles_together():
    """A low-rank draw for each particle of the host's vectorised loss."""
    svi = trained(HWASVI, linear, AutoNormal(linear), covariance="low_rank", rank=3)
    averaged = svi.averaged_guide()
    many = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)
    one = Trace_ELBO()
    losses = [one.loss(linear, averaged, X, Y) for _ in range(400)]
    error = np.std(losses) * np.sqrt(1 / 400 + 1 / 4000)
    assert abs(many.loss(linear, averaged, X, Y) - np.mean(losses)) < 4 * error


def test_forgotten_schedule():
    rate = CosineRestarts(0.05, 5, floor=0.005)
    optim = LambdaLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "lr_lambda": rate})
    svi = SWA(linear, AutoDelta(linear), optim, Trace_ELBO(), start=5, cycle_length=5, learning_rate=rate)
    for _ in range(4):
        svi.step(X, Y)
    with pytest.warns(UserWarning, match=r"the optimiser used 0\.05: .* call optim\.step\(\) after each svi\.step"):
        svi.step(X, Y)


def test_learning_rate_that_is_an_optimiser():
    optim = SGD({"lr": 0.01})
    with pytest.raises(ValueError, match="learning_rate must be a number or a callable of the step"):
        SWA(linear, AutoDelta(linear), optim, Trace_ELBO(), start=5, cycle_length=5, learning_rate=optim)
