"""Ensemble, one draw, and expected weights on NumPyro; mirrors tests/pyro/test_predict_schemes.py."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from jax import random
from numpyro.handlers import block
from numpyro.infer import MCMC, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoGuideList, AutoIAFNormal, AutoNormal
from scipy import stats

from bnn_ppl.numpyro import SGHMC, predict
from bnn_ppl.responses import choose_draws
from tests import prediction_schemes as schemes

X, LABELS = schemes.X, schemes.LABELS


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def priors():
    w0, w1 = (numpyro.sample(name, dist.Normal(0, 1).expand(schemes.SHAPES[name]).to_event(2)) for name in ("w0", "w1"))
    return w0, w1, numpyro.sample("scale", dist.HalfNormal(1))


def model(x, y=None):
    w0, w1, scale = priors()
    with numpyro.plate("data", len(x), subsample_size=min(4, len(x))) as index:
        logits = scale * jnp.tanh(x[index] @ w0) @ w1
        numpyro.sample("y", dist.Categorical(logits=logits), obs=None if y is None else y[index])


def reveal(x):
    """On an identity matrix the means are the entries of the weights."""
    weights = jnp.concatenate([jnp.ravel(value) for value in priors()])
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(x @ weights, 1))


def found_by(source, scheme, **kwargs):
    return predict(source, X, LABELS, model=model, functions=True, scheme=scheme, **kwargs)


def draws_of(guide, num_draws, params, seed=0):
    """The draws of a guide, by site."""
    eye = np.eye(schemes.ENTRIES)
    revealed = predict(
        guide, eye, model=reveal, params=params, functions=True, num_draws=num_draws, seed=seed, row_batch_size=None
    )
    return schemes.entries(revealed["functions"][0])


@cache
def chains():
    kernel = SGHMC(model, step_size=0.05, friction=1.0)
    mcmc = MCMC(kernel, num_warmup=5, num_samples=4, num_chains=2, chain_method="vectorized", progress_bar=False)
    mcmc.run(random.key(0), jnp.asarray(X), jnp.asarray(LABELS))
    return mcmc, jax.tree.map(np.asarray, mcmc.get_samples(group_by_chain=True))


def train(guide):
    svi = SVI(model, guide, numpyro.optim.Adam(0.05), Trace_ELBO())
    return svi.run(random.key(0), 5, jnp.asarray(X), jnp.asarray(LABELS), progress_bar=False).params


@cache
def trained():
    guide = AutoNormal(model)
    return guide, train(guide)


PARAMS = {"location": np.array([[1.0, -1.0, 0.5, 0.0], [0.5, 0.5, -2.0, 1.0]])}


def by_hand(x, y=None):
    location = numpyro.param("location", jnp.zeros((2, 4)))
    numpyro.sample("w0", dist.Normal(location, 1.0).to_event(2))
    numpyro.sample("w1", dist.Normal(location.T[:, :1], 1.0).expand([4, schemes.CLASSES]).to_event(2))
    numpyro.sample("scale", dist.LogNormal(0.0, 1.0))


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


def test_every_draw_is_taken_as_often():
    """By code that both hosts share."""
    taken = np.zeros((schemes.CHAINS, schemes.DRAWS))
    for seed in range(4000):
        np.add.at(taken, choose_draws(taken.shape, None, "stochastic", seed), 1)
    assert stats.chisquare(taken.ravel()).pvalue > 1e-3


def test_stochastic_of_a_chain():
    mcmc, draws = chains()
    found = [predict(mcmc, X, LABELS, functions=True, scheme="stochastic", seed=seed) for seed in (0, 1)]
    for one in found:
        schemes.assert_one(one, schemes.at(draws, one))
    assert float(abs(found[0]["probabilities"] - found[1]["probabilities"]).max()) > 1e-3


@pytest.mark.parametrize("kind", ["automatic", "by hand"])
def test_stochastic_of_a_guide(kind):
    guide, params = trained() if kind == "automatic" else (by_hand, PARAMS)
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
    guide, params = trained()
    medians = {name: np.asarray(params[f"{name}_auto_loc"]) for name in schemes.SHAPES}
    medians["scale"] = np.exp(medians["scale"])
    schemes.assert_one(found_by(guide, "deterministic", params=params), medians)
    schemes.assert_one(found_by(guide, "deterministic", params=params, seed=5), medians)


def test_deterministic_of_a_list_of_guides():
    guide = AutoGuideList(model)
    guide.append(AutoNormal(block(model, hide=["w1"])))
    guide.append(AutoDelta(block(model, expose=["w1"])))
    params = train(guide)
    medians = {name: np.asarray(params[f"{name}_auto_loc"]) for name in schemes.SHAPES}
    medians["scale"] = np.exp(medians["scale"])
    schemes.assert_one(found_by(guide, "deterministic", params=params), medians)


def test_deterministic_takes_the_mean_of_draws_from_a_guide_by_hand():
    draws = draws_of(by_hand, 1000, PARAMS)
    schemes.assert_one(found_by(by_hand, "deterministic", params=PARAMS), schemes.mean(draws, 1))
    few = {name: value[:7] for name, value in draws.items()}
    schemes.assert_one(found_by(by_hand, "deterministic", params=PARAMS, num_draws=7), schemes.mean(few, 1))


def test_deterministic_of_a_guide_without_a_median():
    guide = AutoIAFNormal(model, hidden_dims=[25])
    params = train(guide)
    message = r"takes the median of the guide AutoIAFNormal, which has none of the sites \['w0', 'w1', 'scale'\]: give"
    with pytest.raises(ValueError, match=message):
        found_by(guide, "deterministic", params=params)

    def wrapped(*args, **kwargs):
        guide(*args, **kwargs)

    found = found_by(wrapped, "deterministic", params=params, num_draws=5)
    schemes.assert_one(found, schemes.mean(draws_of(wrapped, 5, params), 1))


def test_one_value_of_the_weights_has_no_spread():
    found = predict(schemes.FLAT, np.eye(schemes.ENTRIES), model=reveal, scheme="deterministic")
    expected = schemes.mean(schemes.FLAT, 1)
    np.testing.assert_allclose(found["mean"], np.concatenate([np.ravel(expected[name]) for name in schemes.SHAPES]))
    np.testing.assert_array_equal(found["function_sd"], 0)
    np.testing.assert_allclose(found["sd"], 1)


@pytest.mark.parametrize("scheme", ["stochastic", "deterministic"])
def test_the_data_type_stays(scheme):
    draws = {name: value.astype(np.float32) for name, value in schemes.BY_CHAIN.items()}
    found = predict(draws, X.astype(np.float32), model=model, functions=True, scheme=scheme)
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
    guide, params = trained()
    params = params | {"w1_auto_loc": jnp.zeros((4, schemes.CLASSES))}
    with pytest.warns(UserWarning, match=r"weights \['w1'\] are all exactly 0"):
        found_by(guide, "deterministic", params=params)
    found = found_by(guide, "ensemble", params=params, num_draws=3)
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
    guide, params = trained()
    with pytest.raises(
        ValueError, match=r"num_draws=5 with scheme='deterministic'.* guide AutoNormal .* num_draws out"
    ):
        found_by(guide, "deterministic", params=params, num_draws=5)
    with pytest.raises(ValueError, match=r"num_draws=2 with scheme='stochastic'"):
        found_by(by_hand, "stochastic", params=PARAMS, num_draws=2)
    for untrained in (AutoNormal(model), AutoGuideList(model)):
        with pytest.raises(ValueError, match=r"guide Auto\w+ has not been trained"):
            found_by(untrained, "deterministic", params=params)
    with pytest.raises(ValueError, match=r"params has no values for \['w0_auto_loc'"):
        found_by(guide, "deterministic")
