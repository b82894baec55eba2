"""Ensemble, one draw, and expected weights on Pyro; mirrors tests/numpyro/test_predict_schemes.py."""

from functools import cache

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer import MCMC, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoIAFNormal, AutoNormal
from pyro.poutine import block

from bnn_ppl.pyro import SGHMC, predict
from tests import prediction_schemes as schemes

X, LABELS = torch.tensor(schemes.X), torch.tensor(schemes.LABELS)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()


def priors():
    w0, w1 = (
        pyro.sample(name, dist.Normal(0.0, 1.0).expand(schemes.SHAPES[name]).to_event(2)) for name in ("w0", "w1")
    )
    return w0, w1, pyro.sample("scale", dist.HalfNormal(1.0))


def model(x, y=None):
    w0, w1, scale = priors()
    with pyro.plate("data", len(x), subsample_size=min(4, len(x))) as index:
        logits = scale * torch.tanh(x[index] @ w0) @ w1
        pyro.sample("y", dist.Categorical(logits=logits), obs=None if y is None else y[index])


def reveal(x):
    """On an identity matrix the means are the entries of the weights."""
    weights = torch.cat([value.reshape(-1) for value in priors()])
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weights, 1.0))


def found_by(source, scheme, **kwargs):
    return predict(source, X, LABELS, model=model, functions=True, scheme=scheme, **kwargs)


def draws_of(guide, num_draws, params=None, seed=0):
    """The draws of a guide, by site."""
    eye = torch.eye(schemes.ENTRIES)
    revealed = predict(
        guide, eye, model=reveal, params=params, functions=True, num_draws=num_draws, seed=seed, row_batch_size=None
    )
    return schemes.entries(revealed["functions"][0])


@cache
def chains():
    pyro.set_rng_seed(0)
    mcmc = MCMC(SGHMC(model, step_size=0.05, friction=1.0), 4, 5, num_chains=2, disable_progbar=True)
    mcmc.run(X, LABELS)
    return mcmc, {name: value.numpy() for name, value in mcmc.get_samples(group_by_chain=True).items()}


def train(guide):
    pyro.set_rng_seed(0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(5):
        svi.step(X, LABELS)
    return guide


PARAMS = {"location": torch.tensor([[1.0, -1.0, 0.5, 0.0], [0.5, 0.5, -2.0, 1.0]], dtype=torch.float64)}


def by_hand(x, y=None):
    location = pyro.param("location", torch.zeros(2, 4))
    pyro.sample("w0", dist.Normal(location, 1.0).to_event(2))
    pyro.sample("w1", dist.Normal(location.T[:, :1], 1.0).expand([4, schemes.CLASSES]).to_event(2))
    pyro.sample("scale", dist.LogNormal(0.0, 1.0))


# ---- ensemble


@pytest.mark.parametrize("draws", [schemes.BY_CHAIN, schemes.FLAT], ids=["chains", "flat"])
def test_ensemble_averages_probabilities(draws):
    found = found_by(draws, "ensemble")
    xr.testing.assert_identical(found, predict(draws, X, LABELS, model=model, functions=True))
    count = len(schemes.FLAT["scale"])
    p = [np.exp(schemes.log_probabilities({name: v[i] for name, v in schemes.FLAT.items()})) for i in range(count)]
    np.testing.assert_allclose(found["probabilities"], sum(p) / count, rtol=1e-9)
    assert found.attrs["num_draws"] == count
    assert np.abs(found["probabilities"] - found_by(draws, "deterministic")["probabilities"]).max() > 0.05


# ---- one draw


def test_stochastic_takes_one_draw_of_all_chains():
    taken = []
    for seed in schemes.SEEDS:
        found = found_by(schemes.BY_CHAIN, "stochastic", seed=seed)
        schemes.assert_one(found, schemes.at(schemes.BY_CHAIN, found))
        taken.append((int(found["chain"][0]), int(found["draw"][0])))
    xr.testing.assert_identical(found_by(schemes.BY_CHAIN, "stochastic", seed=schemes.SEEDS[-1], num_draws=1), found)
    assert len(set(taken)) >= len(schemes.SEEDS) / 2
    assert {chain for chain, _ in taken} == {0, 1}


def test_stochastic_of_draws_without_chains():
    taken = set()
    for seed in schemes.SEEDS:
        found = found_by(schemes.FLAT, "stochastic", seed=seed)
        schemes.assert_one(found, {name: value[found["draw"].values[0]] for name, value in schemes.FLAT.items()})
        assert found["chain"].values.tolist() == [0]
        taken |= set(found["draw"].values.tolist())
    assert len(taken) >= len(schemes.SEEDS) / 2


def test_stochastic_of_a_chain():
    mcmc, draws = chains()
    found = [predict(mcmc, X, LABELS, functions=True, scheme="stochastic", seed=seed) for seed in (0, 1)]
    for one in found:
        schemes.assert_one(one, schemes.at(draws, one))
    assert float(abs(found[0]["probabilities"] - found[1]["probabilities"]).max()) > 1e-3


@pytest.mark.parametrize("kind", ["automatic", "by hand"])
def test_stochastic_of_a_guide(kind):
    guide, params = (train(AutoNormal(model)), None) if kind == "automatic" else (by_hand, PARAMS)
    found = [found_by(guide, "stochastic", params=params, seed=seed) for seed in (0, 1)]
    schemes.assert_one(found[1], {name: value[0] for name, value in draws_of(guide, 3, params, seed=1).items()})
    assert float(abs(found[0]["probabilities"] - found[1]["probabilities"]).max()) > 1e-3


# ---- expected weights


@pytest.mark.parametrize("sizes", [{}, {"draw_batch_size": 4, "row_batch_size": 4}, {"draw_batch_size": 1}])
@pytest.mark.parametrize(("draws", "leading"), [(schemes.BY_CHAIN, 2), (schemes.FLAT, 1)], ids=["chains", "flat"])
def test_deterministic_takes_the_mean_over_chains_and_draws(draws, leading, sizes):
    schemes.assert_one(found_by(draws, "deterministic", **sizes), schemes.mean(draws, leading))


def test_deterministic_of_some_draws():
    some = {name: value[:, [0, 2]] for name, value in schemes.BY_CHAIN.items()}
    schemes.assert_one(found_by(schemes.BY_CHAIN, "deterministic", num_draws=2), schemes.mean(some, 2))


def test_deterministic_of_a_chain():
    mcmc, draws = chains()
    found = predict(mcmc, X, LABELS, functions=True, scheme="deterministic")
    schemes.assert_one(found, schemes.mean(draws, 2))


def test_deterministic_takes_the_median_of_an_automatic_guide():
    guide = train(AutoNormal(model))
    medians = {name: getattr(guide.locs, name).detach().clone() for name in schemes.SHAPES}
    medians["scale"] = medians["scale"].exp()
    schemes.assert_one(found_by(guide, "deterministic"), medians)
    schemes.assert_one(found_by(guide, "deterministic", seed=5), medians)
    given = torch.ones(2, 4)
    found = found_by(guide, "deterministic", params={"AutoNormal.locs.w0": given})
    schemes.assert_one(found, medians | {"w0": given})
    schemes.assert_one(found_by(guide, "deterministic"), medians)


def test_deterministic_of_a_list_of_guides():
    guide = AutoGuideList(model)
    guide.append(AutoNormal(block(model, hide=["w1"])))
    guide.append(AutoDelta(block(model, expose=["w1"])))
    train(guide)
    medians = {name: getattr(guide[0].locs, name).detach() for name in ("w0", "scale")}
    medians |= {"scale": medians["scale"].exp(), "w1": guide[1].w1.detach()}
    schemes.assert_one(found_by(guide, "deterministic"), medians)


def test_deterministic_takes_the_mean_of_draws_from_a_guide_by_hand():
    draws = draws_of(by_hand, 1000, PARAMS)
    schemes.assert_one(found_by(by_hand, "deterministic", params=PARAMS), schemes.mean(draws, 1))
    few = {name: value[:7] for name, value in draws.items()}
    schemes.assert_one(found_by(by_hand, "deterministic", params=PARAMS, num_draws=7), schemes.mean(few, 1))


def test_deterministic_of_a_guide_without_a_median():
    guide = train(AutoIAFNormal(model, hidden_dim=[25]))
    message = r"takes the median of the guide AutoIAFNormal, which has none of the sites \['w0', 'w1', 'scale'\]: give"
    with pytest.raises(ValueError, match=message):
        found_by(guide, "deterministic")

    def wrapped(*args, **kwargs):
        guide(*args, **kwargs)

    found = found_by(wrapped, "deterministic", num_draws=5)
    schemes.assert_one(found, schemes.mean(draws_of(wrapped, 5), 1))


def test_deterministic_of_a_list_with_a_guide_by_hand():
    def part(x, y=None):
        pyro.sample("w1", dist.Normal(torch.zeros(4, schemes.CLASSES), 1.0).to_event(2))

    guide = AutoGuideList(model)
    guide.append(AutoNormal(block(model, hide=["w1"])))
    guide.append(part)
    train(guide)
    with pytest.raises(ValueError, match=r"the guide AutoGuideList, which has none of the sites \['w1'\]: give lambda"):
        found_by(guide, "deterministic")


def test_one_value_of_the_weights_has_no_spread():
    found = predict(schemes.FLAT, torch.eye(schemes.ENTRIES), model=reveal, scheme="deterministic")
    expected = schemes.mean(schemes.FLAT, 1)
    np.testing.assert_allclose(found["mean"], np.concatenate([np.ravel(expected[name]) for name in schemes.SHAPES]))
    np.testing.assert_array_equal(found["function_sd"], 0)
    np.testing.assert_allclose(found["sd"], 1)


@pytest.mark.parametrize("scheme", ["stochastic", "deterministic"])
def test_the_data_type_stays(scheme):
    draws = {name: value.astype(np.float32) for name, value in schemes.BY_CHAIN.items()}
    found = predict(draws, X.float(), model=model, functions=True, scheme=scheme)
    assert found["functions"].dtype == np.float32


# ---- weights of mean 0


@pytest.mark.parametrize(("draws", "names"), schemes.ZERO)
def test_warning_of_weights_whose_expected_values_are_zero(draws, names):
    with pytest.warns(UserWarning, match=r"all exactly 0.* predicts at chance for every row.* scheme='ensemble'") as w:
        found = found_by(draws, "deterministic")
    assert f"the expected values of the weights {names} are" in str(w[0].message)
    assert len(w) == 1
    assert w[0].filename == __file__
    np.testing.assert_allclose(found["probabilities"], np.full((len(X), schemes.CLASSES), 1 / schemes.CLASSES))
    for scheme in ("ensemble", "stochastic"):  # which do not warn
        found_by(draws, scheme)


def test_warning_of_a_guide():
    guide = train(AutoNormal(model))
    with torch.no_grad():
        guide.locs.w1.zero_()
    with pytest.warns(UserWarning, match=r"weights \['w1'\] are all exactly 0"):
        found_by(guide, "deterministic")
    found = found_by(guide, "ensemble", num_draws=3)
    assert float(found["probabilities"].std("row").max()) > 1e-3


def test_no_warning_of_what_is_no_weight():
    """One entry other than 0 is enough, and vectors and numbers may be 0."""
    w0 = np.zeros_like(schemes.FLAT["w0"])
    w0[:, 1, 2] = 1.0
    found_by(schemes.FLAT | {"w0": w0, "scale": 0 * schemes.FLAT["scale"]}, "deterministic")


# ---- bad input


@pytest.mark.parametrize(("arguments", "message"), schemes.BAD)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        predict(schemes.BY_CHAIN, X, LABELS, model=model, **arguments)


@pytest.mark.parametrize(("draws", "message"), schemes.BAD_DRAWS)
def test_bad_draws(draws, message):
    with pytest.raises(ValueError, match=message):
        found_by(draws, "deterministic")


def test_bad_arguments_of_guides():
    guide = train(AutoNormal(model))
    with pytest.raises(
        ValueError, match=r"num_draws=5 with scheme='deterministic'.* guide AutoNormal .* num_draws out"
    ):
        found_by(guide, "deterministic", num_draws=5)
    with pytest.raises(ValueError, match=r"num_draws=2 with scheme='stochastic'"):
        found_by(by_hand, "stochastic", params=PARAMS, num_draws=2)
    for untrained in (AutoNormal(model), AutoGuideList(model)):
        with pytest.raises(ValueError, match=r"guide Auto\w+ has not been trained"):
            found_by(untrained, "deterministic")
