"""predict on NumPyro's own sources and networks: MCMC, guides, flax, convolutions, and what is compiled."""

import logging
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from flax import linen
from jax import random
from numpyro.contrib.module import random_flax_module
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoNormal

from bnn_ppl.numpyro import SGHMC, SGLD, predict

N, B, TEST = 40, 8, 13
RNG = np.random.default_rng(0)
X, X_TEST = (jnp.asarray(RNG.normal(size=(n, 2)), jnp.float32) for n in (N, TEST))
Y, Y_TEST = (x.sum(1) + jnp.asarray(0.3 * RNG.normal(size=len(x)), jnp.float32) for x in (X, X_TEST))


def model(x, y=None, subsample_size=B):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
    noise = numpyro.sample("noise", dist.HalfNormal(1))
    with numpyro.plate("data", len(x), subsample_size=subsample_size) as index:
        mean = numpyro.deterministic("mean", x[index] @ w)
        numpyro.sample("y", dist.Normal(mean, noise), obs=None if y is None else y[index])


def run(kernel, *args, draws=30, chains=2, **kwargs):
    mcmc = MCMC(
        kernel,
        num_warmup=10,
        num_samples=draws,
        num_chains=chains,
        chain_method="vectorized" if chains > 1 else "sequential",
        progress_bar=False,
    )
    mcmc.run(random.key(0), *args, **kwargs)
    return mcmc


def sghmc(model, **settings):
    return SGHMC(model, **{"step_size": 0.02, "friction": 1.0} | settings)


@cache
def chains():
    return run(sghmc(model), X, Y)


@cache
def trained(kind):
    """Guide and parameters after a few steps."""
    guide = kind(model)
    result = SVI(model, guide, numpyro.optim.Adam(0.05), Trace_ELBO()).run(random.key(0), 300, X, Y, progress_bar=False)
    return guide, result.params


def linear(draws, x=X_TEST):
    """Mean and standard deviation of an observation, from draws by site."""
    w, noise = (np.asarray(draws[name], np.float64) for name in ("w", "noise"))
    mean = np.einsum("nk,...k->...n", x, w)
    total = (mean**2 + np.square(noise)[..., None]).reshape(-1, len(x)).mean(0)
    mean = mean.reshape(-1, len(x)).mean(0)
    return mean, np.sqrt(total - mean**2)


@pytest.mark.parametrize("kernel", ["SGHMC", "NUTS"])
def test_mcmc(kernel):
    kwargs = {} if kernel == "SGHMC" else {"subsample_size": None}
    mcmc = chains() if kernel == "SGHMC" else run(NUTS(model, max_tree_depth=3), X, Y, **kwargs)
    found = predict(mcmc, X_TEST, Y_TEST, functions=True, row_batch_size=5, **kwargs)
    draws = jax.tree.map(np.asarray, mcmc.get_samples(group_by_chain=True))
    mean, sd = linear(draws)
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["sd"], sd, rtol=1e-4)
    np.testing.assert_allclose(found["functions"], np.einsum("nk,cdk->cdn", X_TEST, draws["w"]), rtol=1e-4, atol=1e-5)
    assert found["draw_log_density"].shape == (2, 30)
    # The host's get_samples has the deterministic site too, of the training rows.
    same = predict(mcmc.get_samples(), X_TEST, Y_TEST, model=model, functions=True, row_batch_size=5, **kwargs)
    xr.testing.assert_allclose(found["log_density"], same["log_density"])
    assert same["functions"].shape == (1, 60, TEST)


def test_another_model():
    """In this one the noise is known."""

    def quiet(x):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("z", dist.Normal(2 * x @ w, 0.1))

    found = predict(chains(), X_TEST, model=quiet)
    mean = linear(chains().get_samples())[0]
    np.testing.assert_allclose(found["mean"], 2 * mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["sd"] ** 2, found["function_sd"] ** 2 + 0.01, rtol=1e-4)


@pytest.mark.parametrize("kind", [AutoNormal, AutoDelta, AutoLaplaceApproximation])
def test_automatic_guides(kind):
    guide, params = trained(kind)
    found = predict(guide, X_TEST, Y_TEST, model=model, params=params, num_draws=400, functions=True, seed=3)
    draws = jax.jit(lambda key: guide.sample_posterior(key, params, X, Y, sample_shape=(20_000,)))(random.key(1))
    mean, sd = linear(jax.tree.map(np.asarray, draws))
    function_sd = np.einsum("nk,sk->sn", X_TEST, np.asarray(draws["w"], np.float64)).std(0)
    # Z-scores of averages over 400 draws.
    assert np.all(np.abs(found["mean"] - mean) <= 5 * function_sd / 20 + 1e-5)
    np.testing.assert_allclose(found["function_sd"], function_sd, rtol=0.2, atol=1e-6)
    np.testing.assert_allclose(found["sd"], sd, rtol=0.2)
    assert (function_sd.max() > 1e-3) == (kind is not AutoDelta)
    assert found["functions"].shape == (1, 400, TEST)


def test_draws_of_a_guide_are_those_of_the_seed():
    guide, params = trained(AutoNormal)
    arguments = {"model": model, "params": params, "num_draws": 9, "functions": True}
    first = predict(guide, X_TEST, **arguments)
    for sizes in ({"draw_batch_size": 2}, {"row_batch_size": 4, "draw_batch_size": 7}):
        xr.testing.assert_allclose(predict(guide, X_TEST, **arguments, **sizes), first, rtol=1e-5)
    other = predict(guide, X_TEST, **arguments, seed=1)
    assert not (other["functions"] == first["functions"]).any()
    assert len(np.unique(first["functions"][0, :, 0])) == 9
    assert predict(guide, X_TEST, model=model, params=params).attrs["num_draws"] == 1000


def hand_written(x, y=None, subsample_size=B):
    location = numpyro.param("location", jnp.zeros(2))
    numpyro.sample("w", dist.Normal(location, 0.1).to_event(1))
    numpyro.sample("noise", dist.Delta(numpyro.param("size", 0.5, constraint=dist.constraints.positive)))


def test_guides_written_by_hand():
    params = {"location": jnp.array([1.0, -1.0]), "size": 0.3}
    found = predict(hand_written, X_TEST, model=model, params=params, num_draws=500)
    np.testing.assert_allclose(found["mean"], X_TEST[:, 0] - X_TEST[:, 1], atol=5 * 0.1 * 3 / 500**0.5)
    np.testing.assert_allclose(found["function_sd"], 0.1 * np.linalg.norm(X_TEST, axis=1), rtol=0.2)
    np.testing.assert_allclose(found["sd"] ** 2, found["function_sd"] ** 2 + 0.09, rtol=1e-4)


def test_guides_without_their_parameters():
    for guide, names in ((hand_written, r"\['location', 'size'\]"), (trained(AutoNormal)[0], "auto_loc")):
        with pytest.raises(ValueError, match=rf"params has no values for .*{names}.*: pass params=svi_result.params"):
            predict(guide, X_TEST, model=model)
    with pytest.raises(ValueError, match="guide AutoNormal has not been trained"):
        predict(AutoNormal(model), X_TEST, model=model)


def test_as_the_hosts_predictive():
    """Its draws of observations have our mean and standard deviation."""
    draws = jax.tree.map(lambda v: jnp.tile(v, (100, *[1] * (v.ndim - 1))), chains().get_samples())
    sampled = Predictive(model, {"w": draws["w"], "noise": draws["noise"]})(random.key(1), X_TEST, subsample_size=None)
    found = predict(chains(), X_TEST)
    z = (sampled["y"].mean(0) - found["mean"]) / found["sd"] * len(draws["w"]) ** 0.5
    assert np.abs(z).max() < 4.5
    np.testing.assert_allclose(sampled["y"].std(0), found["sd"], rtol=0.1)


def test_chains_that_cannot_predict():
    mcmc = MCMC(sghmc(model), num_warmup=5, num_samples=5, progress_bar=False)
    with pytest.raises(ValueError, match=r"mcmc has no draws yet: call mcmc\.run first"):
        predict(mcmc, X_TEST)
    kernel = SGLD(potential_fn=lambda z: jnp.sum(z["w"] ** 2), step_size=0.1)
    mcmc = MCMC(kernel, num_warmup=0, num_samples=20, progress_bar=False)
    mcmc.run(random.key(0), init_params={"w": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"a chain of a potential_fn brings no model, so give the one .* as model="):
        predict(mcmc, X_TEST)

    def known_noise(x):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(x @ w, 0.5))

    found = predict(mcmc, X_TEST, model=known_noise)
    np.testing.assert_allclose(found["mean"], X_TEST @ mcmc.get_samples()["w"].mean(0), rtol=1e-4, atol=1e-5)


def test_sites_left_out_of_the_run():
    mcmc = MCMC(sghmc(model), num_warmup=5, num_samples=5, progress_bar=False)
    mcmc.run(random.key(0), X, Y, extra_fields=("~z.w",))
    with pytest.raises(ValueError, match=r"latent sites \['w'\] of the model have no draws"):
        predict(mcmc, X_TEST)


def test_known_responses_of_a_chain():
    """Sites that the chain did not observe are no responses."""

    def simulates(x, y=None):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)
            if y is None:
                numpyro.sample("simulated", dist.Normal(x @ w, 0.5))

    mcmc = run(NUTS(simulates, max_tree_depth=3), X, Y, draws=5)
    mean = X_TEST @ mcmc.get_samples()["w"].mean(0)
    np.testing.assert_allclose(predict(mcmc, X_TEST)["mean"], mean, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"observed sites \['y', 'simulated'\]"):
        predict(mcmc.get_samples(), X_TEST, model=simulates)


def test_chains_of_minibatches():
    """The kernel then shows no model to the host, for nobody holds all data."""

    def streamed(x, y=None):
        shift = numpyro.param("shift", 0.5)
        w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
        with numpyro.plate("data", N, subsample_size=len(x)):
            numpyro.sample("y", dist.Normal(x @ w + shift, 0.5), obs=y)

    batches = [(X[i : i + B], Y[i : i + B]) for i in range(0, N, B)]
    kernel = sghmc(streamed, minibatches=batches)
    mcmc = MCMC(kernel, num_warmup=2, num_samples=6, progress_bar=False)
    with pytest.warns(UserWarning, match="param sites"):
        mcmc.run(random.key(0))
    found = predict(mcmc, X_TEST, Y_TEST, row_batch_size=5)
    mean = X_TEST @ mcmc.get_samples()["w"].mean(0) + 0.5
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", [0.7, lambda key: random.normal(key)])
def test_param_sites(start):
    def shifted(x, y=None):
        shift = numpyro.param("shift", start)
        w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
        with numpyro.plate("data", len(x), subsample_size=B) as index:
            numpyro.sample("y", dist.Normal(x[index] @ w + shift, 0.5), obs=None if y is None else y[index])

    draws = chains().get_samples()
    mean = X_TEST @ draws["w"].mean(0)
    found = predict(draws, X_TEST, model=shifted, params={"shift": 2.0})
    np.testing.assert_allclose(found["mean"], mean + 2, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"param sites \['shift'\] of the model have no values: pass params="):
        predict(draws, X_TEST, model=shifted)
    if start == 0.7:
        return
    kernel = sghmc(shifted)
    with pytest.warns(UserWarning, match="param sites"):
        mcmc = run(kernel, X, Y, draws=5)
    mean = X_TEST @ mcmc.get_samples()["w"].mean(0)
    np.testing.assert_allclose(predict(mcmc, X_TEST)["mean"], mean + kernel._held["shift"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(predict(mcmc, X_TEST, params={"shift": 2.0})["mean"], mean + 2, rtol=1e-4, atol=1e-5)


class Convolutional(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.max_pool(jnp.tanh(linen.Conv(3, (3, 3))(x)), (2, 2), (2, 2))
        return linen.Dense(4)(x.reshape(len(x), -1))


def test_networks_of_flax():
    """By flax itself, draw for draw; also through the convolutions that are exchanged on a CPU."""
    network = Convolutional()
    x, labels = RNG.normal(size=(7, 6, 6, 1)).astype(np.float32), RNG.integers(0, 4, 7)

    def classifier(x, y=None):
        net = random_flax_module("net", network, dist.Normal(), input_shape=(1, 6, 6, 1))
        with numpyro.plate("data", 1000, subsample_size=B) as index:
            numpyro.sample("y", dist.Categorical(logits=net(x[index])), obs=None if y is None else y[index])

    keys = random.split(random.key(0), 5)
    params = jax.vmap(lambda key: network.init(key, x))(keys)["params"]
    draws = {f"net/{layer}.{name}": value for layer, group in params.items() for name, value in group.items()}
    found = predict(draws, x, labels, model=classifier, row_batch_size=3, functions=True)
    p = jax.nn.softmax(jax.vmap(lambda values: network.apply({"params": values}, x))(params))
    np.testing.assert_allclose(found["functions"][0], p, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["log_density"], np.log(p[:, np.arange(7), labels].mean(0)), rtol=1e-4)


def test_random_keys_are_refused():
    def dropped(x):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
        keep = random.bernoulli(numpyro.prng_key(), 0.5, x.shape)
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal((keep * x) @ w, 1.0))

    with pytest.raises(ValueError, match=r"draws random keys of its own .*dropout"):
        predict(chains().get_samples(), X_TEST, model=dropped)


def test_models_that_look_at_values():
    def looks(x):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(x @ w, float(x[0, 0]) ** 2))

    with pytest.raises(jax.errors.JAXTypeError) as caught:
        predict(chains().get_samples(), X_TEST, model=looks)
    assert any("cannot look at the values of its arguments" in note for note in caught.value.__notes__)


def test_masked_rows_have_no_density():
    def masked(x, y=None):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
        with numpyro.plate("data", len(x)), numpyro.handlers.mask(mask=x[:, 0] > 0):
            numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    found = predict(chains().get_samples(), X_TEST, Y_TEST, model=masked)
    np.testing.assert_array_equal(found["log_density"] == 0, X_TEST[:, 0] <= 0)


@pytest.mark.parametrize("data", [(X_TEST,), (X_TEST, Y_TEST)])
def test_one_program_for_all_batches(caplog, data):
    """Draws in several batches, the last one short, and rows likewise."""
    draws = chains().get_samples(group_by_chain=True)
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        predict(draws, *data, model=model, row_batch_size=3, draw_batch_size=7)
    compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Finished XLA compilation")]
    assert sum("jit(evaluate)" in message for message in compiled) == 1
    assert len(compiled) < 15  # small programs that take the draws of a batch
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        predict(draws, *data, model=model, row_batch_size=3, draw_batch_size=7)
    compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Finished XLA compilation")]
    assert len(compiled) <= 2
