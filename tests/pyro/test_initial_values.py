"""Chains that start from a guide, an optimiser's result or earlier draws, and sites that are held fixed."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.optim import Adam

from bnn_ppl.pyro import SGHMC, SGLD

N, B = 24, 8
STILL = {"step_size": 1e-9, "temperature": 0.0}
rng = np.random.default_rng(0)
X = torch.tensor(rng.normal(size=(N, 2)))
Y = X @ torch.tensor([1.0, -0.5], dtype=torch.float64) + 0.3 * torch.tensor(rng.normal(size=N))
SHAPES = {"b": (3,), "scale": (), "w": (2,)}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()


def model(x, y):
    w = pyro.sample("w", dist.Normal(5.0, 1.0).expand([2]).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(1.0, 0.5))
    with pyro.plate("columns", 3):
        b = pyro.sample("b", dist.Normal(-5.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=B) as idx:
        pyro.sample("y", dist.Normal(x[idx] @ w + b.mean(), scale), obs=y[idx])


def run(kernel, *args, num_samples=1, **options):
    pyro.set_rng_seed(0)
    mcmc = MCMC(kernel, num_samples, warmup_steps=0, disable_progbar=True, **options)
    mcmc.run(*(args or (X, Y)))
    return mcmc


def first_draws(mcmc):
    """Shapes (chains, ...)."""
    return {name: value[:, 0].numpy() for name, value in mcmc.get_samples(group_by_chain=True).items()}


def starts(values, model=model):
    """Where a chain starts, by site."""
    kernel = SGLD(model, init_strategy=values, **STILL)
    kernel.setup(0, X, Y)
    return {n: kernel.transforms[n].inv(value).numpy() for n, value in kernel.initial_params.items()}


def assert_starts(values, found):
    for name, value in values.items():
        expected = value.detach() if isinstance(value, torch.Tensor) else value
        np.testing.assert_allclose(found[name], np.broadcast_to(expected, found[name].shape), atol=1e-5, err_msg=name)


VALUES = {"b": np.array([3.0, 2.0, 1.0]), "scale": 1.5, "w": np.array([-1.0, 2.0])}


@pytest.mark.parametrize("count", [1, 2])
def test_all_sites_start_where_told(count):
    found = first_draws(run(SGLD(model, init_strategy=VALUES, **STILL), num_chains=count))
    assert {name: value.shape for name, value in found.items()} == {n: (count, *s) for n, s in SHAPES.items()}
    assert_starts(VALUES, found)


@pytest.mark.parametrize("site", VALUES)
def test_other_sites_start_near_the_prior_s_centre(site):
    given = {site: VALUES[site]}
    found = starts(given)
    assert_starts(given, found)
    centre = {"b": -5.0, "scale": np.exp(1 + 0.5**2 / 2), "w": 5.0}  # the prior's means
    for name in set(found) - {site}:
        assert np.all(np.abs(found[name] - centre[name]) < 4.0 / np.sqrt(2))
        assert np.all(np.abs(found[name] - VALUES[name]) > 0.5)


@pytest.mark.parametrize(
    "value",
    [
        1,
        np.array([1, 2]),
        np.array([1.0, 2.0], np.float32),
        torch.tensor([1, 2]),
        torch.tensor(2.0, requires_grad=True),
    ],
)
def test_numbers_of_any_type(value):
    site = "w" if np.ndim(value) else "scale"
    assert_starts({site: value}, starts({site: value}))


def test_numpy_values_take_the_type_of_a_model_of_32_bits():
    torch.set_default_dtype(torch.float32)
    mcmc = run(SGLD(model, init_strategy=VALUES, **STILL), X.float(), Y.float())
    assert {value.dtype for value in mcmc.get_samples().values()} == {torch.float32}
    assert_starts(VALUES, first_draws(mcmc))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"v": 1.0, "w": VALUES["w"]}, r"has values for \['v'\], and the latent sites are \['b', 'scale', 'w'\]"),
        ({"y": Y}, r"has values for \['y'\]"),
        ({"w": np.zeros(3)}, r"a value of shape \(3,\) for site 'w' of shape \(2,\): give one value"),
        ({"w": np.zeros((10, 2))}, r"a value of shape \(10, 2\) for site 'w' of shape \(2,\)"),
        ({"b": 1.0}, r"a value of shape \(\) for site 'b' of shape \(3,\)"),
        ({"scale": -1.0}, r"a value of site 'scale' that is not in its support, GreaterThan\("),
        ({"w": np.array([1.0, np.nan])}, "a value of site 'w' that is not in its support"),
    ],
    ids=["unknown", "observed", "shape", "all draws", "plate", "support", "NaN"],
)
def test_values_that_cannot_be(values, match):
    with pytest.raises(ValueError, match=match):
        starts(values)


# Where values come from


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_from_a_guide(guide):
    pyro.set_rng_seed(0)
    guide = guide(model)
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(20):
        svi.step(X, Y)
    median = guide.median(X, Y)
    assert set(median) == set(SHAPES)
    assert_starts(median, starts(median))


@pytest.fixture
def earlier():
    """Two chains of another kernel."""
    return run(SGHMC(model, step_size=0.02, friction=5.0, steps_per_draw=5), num_samples=4, num_chains=2)


def test_from_the_last_draw(earlier):
    last = {name: value[-1] for name, value in earlier.get_samples().items()}
    assert_starts(last, starts(last))


def test_chains_from_different_draws(earlier):
    chosen = {name: value[1:6:2] for name, value in earlier.get_samples().items()}
    assert len(np.unique(chosen["w"])) == 6
    unconstrained = {name: earlier.kernel.transforms[name](value) for name, value in chosen.items()}
    several = run(SGLD(model, **STILL), initial_params=unconstrained, num_chains=3)
    assert_starts(chosen, first_draws(several))


def test_chains_from_where_chains_ended(earlier):
    ends = {name: value[:, -1] for name, value in earlier.get_samples(group_by_chain=True).items()}
    states = [chain["params"] for chain in earlier.kernel.state_dict(earlier)["chains"]]
    last = {name: torch.stack([state[name] for state in states]) for name in SHAPES}
    again = run(SGLD(model, **STILL), initial_params=last, num_chains=2)
    assert_starts(ends, first_draws(again))


# Sites held fixed


@pytest.mark.parametrize("name", ["SGLD", "SGHMC"])
def test_conditioned_sites_are_held(name):
    options = {"step_size": 0.002, "steps_per_draw": 3} | ({} if name == "SGLD" else {"friction": 5.0})
    make = {"SGLD": SGLD, "SGHMC": SGHMC}[name]

    def by_hand(x, y):
        w = pyro.sample("w", dist.Normal(5.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("columns", 3):
            b = pyro.sample("b", dist.Normal(-5.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=B) as idx:
            pyro.sample("y", dist.Normal(x[idx] @ w + b.mean(), 0.7), obs=y[idx])

    start = {"b": VALUES["b"], "w": VALUES["w"]}
    held, expected = (
        run(make(m, init_strategy=start, **options), num_samples=5).get_samples()
        for m in (poutine.condition(model, {"scale": torch.tensor(0.7)}), by_hand)
    )
    assert set(held) == set(expected) == {"b", "w"}
    for site in held:
        np.testing.assert_allclose(held[site], expected[site], rtol=1e-10)
        assert (np.diff(held[site], axis=0) != 0).all()
