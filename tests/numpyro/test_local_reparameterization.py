"""Local reparameterisation of NumPyro models; mirrors tests/pyro/test_local_reparameterization.py."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from jax import lax, random
from numpyro import handlers
from numpyro.contrib.module import random_nnx_module
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


def outputs(model, guide, *args, seed=0, sites=None):
    """What a model under local reparameterisation calls f."""
    model, guide = local_reparameterization(model, guide, sites=sites)
    guided = handlers.trace(handlers.seed(guide, seed)).get_trace(*args)
    run = handlers.seed(handlers.replay(model, guided), seed + 1)
    return np.asarray(handlers.trace(run).get_trace(*args)["f"]["value"])


def guide_of(loc, scale):
    def guide(*args):
        numpyro.sample("w", dist.Normal(jnp.asarray(loc), jnp.asarray(scale)).to_event(loc.ndim))

    return guide


@jax.jit
def inner(x, w):
    return jax.checkpoint(jnp.dot)(x, w)


DENSE = {
    "matmul": lambda x, w: x @ w,
    "transposed": lambda x, w: (w.T @ x.T).T,
    "einsum": lambda x, w: jnp.einsum("bi,io->bo", x, w),
    "jit": inner,
    "vmap": lambda x, w: jax.vmap(lambda row: row @ w)(x),
    "pieces": lambda x, w: jnp.concatenate([x @ w[:, :1], x @ w[:, 1:]], -1),
    "reshaped": lambda x, w: x @ (-2.0 * -w.reshape(-1, 1).reshape(w.shape) / 2.0).astype(x.dtype),
}


@pytest.mark.parametrize("layer", DENSE)
@pytest.mark.filterwarnings("ignore:the sites .* are in several layers")
def test_moments_of_a_dense_layer(layer):
    def model(x):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([local.INPUTS, local.OUTPUTS]).to_event(2))
        numpyro.deterministic("f", DENSE[layer](x, w))

    x = jnp.broadcast_to(local.ROW, (local.ROWS, local.INPUTS))
    found = outputs(model, guide_of(local.LOC, local.SCALE), x)
    mean, variance = local.dense(local.ROW, local.LOC), local.dense(local.ROW**2, local.SCALE**2)
    local.check_moments(found, mean, variance)


def test_layers_have_noise_of_their_own():
    def model(x):
        prior = dist.Normal(0.0, 1.0).expand([local.INPUTS, local.OUTPUTS]).to_event(2)
        numpyro.deterministic("f", jnp.concatenate([x @ numpyro.sample(name, prior) for name in ("w", "v")], -1))

    def guide(x):
        for name in ("w", "v"):
            numpyro.sample(name, dist.Normal(jnp.asarray(local.LOC), jnp.asarray(local.SCALE)).to_event(2))

    found = outputs(model, guide, jnp.broadcast_to(local.ROW, (local.ROWS, local.INPUTS)))
    mean, variance = local.dense(local.ROW, local.LOC), local.dense(local.ROW**2, local.SCALE**2)
    local.check_moments(found, np.tile(mean, 2), np.tile(variance, 2))


FUNCTIONS = {
    "gate": lambda x, w: x @ (w * (w > 0)),
    "norm": lambda x, w: x @ (w / jnp.linalg.norm(w)),
    "silu": lambda x, w: x @ jax.nn.silu(w),
    "square": lambda x, w: x @ w**2,
    "rows": lambda x, w: x @ w[jnp.array([0, 0, 1, 2])],
    "both": lambda x, w: x[:, : local.OUTPUTS] @ (w.T @ w),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_of_weights_are_of_the_draw(function):
    """What is no layer of the weights themselves has the same draw in each row."""

    def model(x):
        prior = dist.Normal(0.0, 1.0).expand([local.INPUTS, local.OUTPUTS]).to_event(2)
        v, w = numpyro.sample("v", prior), numpyro.sample("w", prior)
        numpyro.deterministic("f", jnp.concatenate([x @ v, FUNCTIONS[function](x, w)], -1))

    def guide(x):
        for name in ("v", "w"):
            numpyro.sample(name, dist.Normal(jnp.asarray(local.LOC), jnp.asarray(local.SCALE)).to_event(2))

    spread = outputs(model, guide, jnp.broadcast_to(local.ROW, (local.ROWS, local.INPUTS))).std(0)
    assert spread[: local.OUTPUTS].min() > 0.1
    assert spread[local.OUTPUTS :].max() < 1e-9


def test_latents_of_rows_are_drawn():
    """Each enters several outputs of its row, which must stay dependent."""
    ones = jnp.ones((1, 3))

    def model(x):
        v = numpyro.sample("v", dist.Normal(0.0, 1.0).expand([local.INPUTS, 3]).to_event(2))
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(1), 1.0).to_event(1))
        numpyro.deterministic("f", jnp.concatenate([x @ v, z @ ones], -1))

    def guide(x):
        numpyro.sample("v", dist.Normal(0.0, 1.0).expand([local.INPUTS, 3]).to_event(2))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("z", dist.Normal(jnp.zeros(1), 1.0).to_event(1))

    found = outputs(model, guide, jnp.ones((5, local.INPUTS)))
    assert found[:, :3].std(0).min() > 0.1
    assert found[:, 3:].std(1).max() < 1e-9


def test_chosen_sites():
    def model(x):
        prior = dist.Normal(0.0, 1.0).expand([local.INPUTS, local.OUTPUTS]).to_event(2)
        numpyro.deterministic("f", jnp.concatenate([x @ numpyro.sample(name, prior) for name in ("v", "w")], -1))

    def guide(x):
        for name in ("v", "w"):
            numpyro.sample(name, dist.Normal(jnp.asarray(local.LOC), jnp.asarray(local.SCALE)).to_event(2))

    x = jnp.broadcast_to(local.ROW, (local.ROWS, local.INPUTS))
    for sites in (["v"], lambda name, shape: name == "v" and shape == (local.INPUTS, local.OUTPUTS)):
        spread = outputs(model, guide, x, sites=sites).std(0)
        assert spread[: local.OUTPUTS].min() > 0.1
        assert spread[local.OUTPUTS :].max() < 1e-9
    with pytest.raises(ValueError, match=r"sites=\['u'\] names \['u'\], which the guide does not draw from normals"):
        outputs(model, guide, x, sites=["u"])
    with pytest.raises(ValueError, match=r"sites must be a list of names or a callable .* got 'v': give \['v'\]"):
        outputs(model, guide, x, sites="v")


LAYOUTS = {"last": ("NHWC", "HWIO", "NHWC"), "first": ("NCHW", "OIHW", "NCHW")}


@pytest.mark.parametrize("channels", LAYOUTS)
def test_moments_of_a_convolution(channels):
    def model(x):
        shape = (local.WINDOW, local.WINDOW, local.INPUTS, local.OUTPUTS)
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand(shape).to_event(4))
        if channels == "first":
            x, w = x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1)
        y = lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=LAYOUTS[channels])
        numpyro.deterministic("f", y.transpose(0, 2, 3, 1) if channels == "first" else y)

    x = jnp.broadcast_to(local.IMAGE, (local.ROWS, *local.IMAGE.shape))
    found = outputs(model, guide_of(local.KERNEL_LOC, local.KERNEL_SCALE), x)
    mean = local.convolution(local.IMAGE, local.KERNEL_LOC)
    local.check_moments(found, mean, local.convolution(local.IMAGE**2, local.KERNEL_SCALE**2))


def test_moments_of_a_network():
    def model(x):
        prior = lambda name, shape: dist.Normal(0.0, 1.0)  # noqa: E731
        net = random_nnx_module("net", nnx.Linear(local.INPUTS, local.OUTPUTS, rngs=nnx.Rngs(0)), prior)
        numpyro.deterministic("f", net(x))

    x = jnp.broadcast_to(local.ROW, (local.ROWS, local.INPUTS))
    start = init_to_value(values={"net/kernel": local.LOC, "net/bias": jnp.ones(local.OUTPUTS)})
    guide = AutoNormal(model, init_loc_fn=start, init_scale=0.3)
    with handlers.seed(rng_seed=0):
        guide(x)
    found = outputs(model, guide, x)
    bias = handlers.trace(handlers.seed(guide, 0)).get_trace(x)["net/bias"]["value"]
    mean = local.dense(local.ROW, local.LOC) + np.asarray(bias)  # drawn once
    local.check_moments(found, mean, local.dense(local.ROW**2, np.full(local.LOC.shape, 0.09)))


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
        f = lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=LAYOUTS["last"])
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
