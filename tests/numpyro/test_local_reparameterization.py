"""Local reparameterisation in NumPyro's SVI; mirrors tests/pyro/test_local_reparameterization.py."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import lax, random
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from numpyro.infer.initialization import init_to_value

from bnn_ppl.numpyro import (
    AutoVarianceNetwork,
    AutoVariationalDropout,
    local_reparameterization,
    predict,
)
from tests import dropout, local


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def network(x, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([6, 20]).to_event(2))
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([20]).to_event(1))
    v = numpyro.sample("v", dist.Normal(0.0, 0.2).expand([20]).to_event(1))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    shift = numpyro.param("shift", 0.3)
    numpyro.factor("small", -jnp.square(w).sum())
    with numpyro.plate("data", len(x), subsample_size=30) as rows, handlers.scale(scale=0.5):
        f = numpyro.deterministic("f", jnp.tanh(x[rows] @ w + b) @ v + shift)
        with handlers.mask(mask=f > -1e9):
            numpyro.sample("y", dist.Normal(f, noise), obs=None if y is None else y[rows])


quiet = handlers.condition(network, {"noise": 0.5})


def written(x, y=None):
    for name, shape in (("w", (6, 20)), ("b", (20,)), ("v", (20,))):
        loc = numpyro.param(f"{name}_loc", jnp.linspace(-1, 1, np.prod(shape)).reshape(shape))
        scale = numpyro.param(f"{name}_scale", jnp.full(shape, 0.1), constraint=dist.constraints.positive)
        numpyro.sample(name, dist.Normal(loc, scale).to_event(len(shape)))


def test_nothing_changes_without_noise():
    """Of narrow normals, the loss and each site of the trace are those of the model itself."""
    guide = AutoNormal(network, init_scale=1e-9)
    both = local_reparameterization(network, guide)
    args = jnp.asarray(local.X), jnp.asarray(local.Y)
    svi = SVI(network, guide, optax.sgd(0.0), Trace_ELBO())
    params = svi.get_params(svi.init(random.key(0), *args))
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO(), Trace_ELBO(num_particles=2)):
        plain = elbo.loss(random.key(1), params, network, guide, *args)
        assert float(elbo.loss(random.key(1), params, *both, *args)) == pytest.approx(float(plain), rel=1e-6)
    with handlers.seed(rng_seed=1), handlers.substitute(data=params):
        guided = handlers.trace(both[1]).get_trace(*args)
    plain, changed = (
        handlers.trace(handlers.seed(handlers.replay(handlers.substitute(model, params), guided), 2)).get_trace(*args)
        for model in (network, both[0])
    )
    assert set(plain) == set(changed)
    for name, site in plain.items():
        if site["type"] == "sample":
            assert (site["scale"], site["cond_indep_stack"]) == (
                changed[name]["scale"],
                changed[name]["cond_indep_stack"],
            )
        if name not in ("y", "small"):
            np.testing.assert_allclose(changed[name]["value"], site["value"], rtol=1e-6)


def test_predictive_takes_the_model():
    model, _ = local_reparameterization(network, AutoNormal(network))
    found = Predictive(model, num_samples=2)(random.key(0), jnp.asarray(local.X))
    assert found["y"].shape == (2, 30)


GUIDES = {
    "AutoNormal": lambda: AutoNormal(quiet),
    "by hand": lambda: written,
}


@pytest.mark.parametrize("name", GUIDES)
def test_same_expectation_with_less_variance(name):
    guide = GUIDES[name]()
    args = jnp.asarray(local.X), jnp.asarray(local.Y)
    svi = SVI(quiet, guide, optax.sgd(0.0), TraceMeanField_ELBO())
    params = svi.get_params(svi.init(random.key(0), *args))
    found = {}
    for kind, pair in {"plain": (quiet, guide), "local": local_reparameterization(quiet, guide)}.items():
        value = jax.value_and_grad(lambda p, key, pair=pair: TraceMeanField_ELBO().loss(key, p, *pair, *args))
        found[kind] = jax.jit(jax.vmap(value, (None, 0)))(params, random.split(random.key(1), 4000))
    plain, changed = (found[kind][0] for kind in ("plain", "local"))
    error = ((plain.var() + changed.var()) / 4000) ** 0.5
    assert abs(plain.mean() - changed.mean()) < 4 * error
    scale = next(p for p in params if p.startswith("w") and p.endswith("scale"))
    slopes = {kind: values[1][scale] for kind, values in found.items()}
    errors = jnp.sqrt(sum(s.var(0) for s in slopes.values()) / 4000)
    assert jnp.abs((slopes["plain"].mean(0) - slopes["local"].mean(0)) / errors).max() < 4.5
    assert slopes["local"].var(0).sum() < 0.5 * slopes["plain"].var(0).sum()


def regression(x, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


@pytest.mark.parametrize("guide", [AutoNormal, AutoVariationalDropout])
def test_conjugate_optimum(guide):
    start = init_to_value(values={"w": jnp.asarray(dropout.START)})
    guide = guide(regression, init_loc_fn=start)
    optimiser = optax.adam(optax.cosine_decay_schedule(0.03, 3000))
    svi = SVI(*local_reparameterization(regression, guide), optimiser, TraceMeanField_ELBO())
    params = svi.run(random.key(0), 3000, dropout.X, dropout.Y, progress_bar=False).params
    mean, sd = dropout.conjugate()
    np.testing.assert_allclose(guide.median(params)["w"], mean, atol=0.1 * sd.min())
    high = guide.quantiles(params, [dist.Normal().cdf(1.0)])["w"][0]
    np.testing.assert_allclose(high - guide.median(params)["w"], sd, rtol=0.1)
    predicted = predict(guide, dropout.X, model=regression, params=params, num_draws=500)["mean"].values
    np.testing.assert_allclose(predicted, dropout.X @ mean, atol=0.1)


def test_inputs_of_zero():
    """No noise, and finite gradients, where a root has none."""
    guide = AutoVarianceNetwork(regression)
    pair = local_reparameterization(regression, guide)
    args = jnp.zeros((4, 3)), jnp.zeros(4)
    svi = SVI(*pair, optax.sgd(0.0), TraceMeanField_ELBO())
    params = svi.get_params(svi.init(random.key(0), *args))
    loss, slopes = jax.value_and_grad(lambda p: TraceMeanField_ELBO().loss(random.key(1), p, *pair, *args))(params)
    divergence = -0.5 * (1 + jnp.log(params["w_auto_sigma"] ** 2) - params["w_auto_sigma"] ** 2).sum()
    assert float(loss) == pytest.approx(float(divergence) + 2 * np.log(2 * np.pi), rel=1e-9)
    assert np.isfinite(slopes["w_auto_sigma"]).all()


def test_convolutions_train_in_a_loop():
    def model(x, y=None):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 3, 1, 4]).to_event(4))
        f = lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(jnp.tanh(f).mean((1, 2, 3)), 1.0), obs=y)

    svi = SVI(*local_reparameterization(model, AutoNormal(model)), optax.adam(0.1), TraceMeanField_ELBO())
    x = random.normal(random.key(0), (8, 6, 6, 1))
    assert np.isfinite(svi.run(random.key(1), 5, x, jnp.ones(8), progress_bar=False).losses).all()


@pytest.mark.parametrize("guide", [AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal])
def test_a_guide_without_normals_is_refused(guide):
    svi = SVI(*local_reparameterization(regression, guide(regression)), optax.sgd(0.0), Trace_ELBO())
    with pytest.raises(ValueError, match=r"guide draws no site from a normal of its own, .*\s*such as AutoNormal"):
        svi.init(random.key(0), dropout.X, dropout.Y)


def test_a_model_without_layers_is_refused():
    def model(y=None):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        numpyro.sample("y", dist.Normal(w.sum(), 1.0), obs=y)

    svi = SVI(*local_reparameterization(model, AutoNormal(model)), optax.sgd(0.0), Trace_ELBO())
    with pytest.raises(ValueError, match=r"no layer with one of the sites \['w'\] that local_reparameterization knows"):
        svi.init(random.key(0), 0.0)


def test_a_condition_outside_is_refused():
    model, guide = local_reparameterization(regression, AutoNormal(regression))
    svi = SVI(handlers.condition(model, {"y": dropout.Y}), guide, optax.sgd(0.0), Trace_ELBO())
    with pytest.raises(
        ValueError, match=r"site 'y' is observed by a handler around .* local_reparameterization\(condition"
    ):
        svi.init(random.key(0), dropout.X)


def test_a_site_in_several_layers_is_told():
    def model(x, y=None):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 3]).to_event(2))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal((x @ w @ w).sum(-1), 1.0), obs=y)

    svi = SVI(*local_reparameterization(model, AutoNormal(model)), optax.sgd(0.0), Trace_ELBO())
    with pytest.warns(UserWarning, match=r"the sites \['w'\] are in several layers"):
        svi.init(random.key(0), dropout.X, dropout.Y)
