"""The models of both backends: equal log densities, unbiased minibatches, exact posteriors."""

import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.handlers
import numpyro.infer
import pyro
import pyro.infer
import pyro.poutine as poutine
import pytest
import torch
from jax import random
from numpyro.infer.util import log_density
from scipy.optimize import approx_fprime
from scipy.special import logsumexp
from scipy.stats import halfnorm, norm

from bnn_ppl.models import checks, conjugate
from bnn_ppl.models import numpyro as numpyro_models
from bnn_ppl.models import pyro as pyro_models
from tests.models.data import BINARY, LABELS, TARGETS, D, N, X

MODELS = {
    "linear": ("linear_regression", {}, TARGETS),
    "linear_known": ("linear_regression", {"noise_scale": 0.3, "prior_scale": 2.0}, TARGETS),
    "logistic": ("logistic_regression", {"prior_scale": 1.7}, BINARY),
    "softmax": ("logistic_regression", {"num_classes": 4, "prior_scale": 0.7}, LABELS),
    "mlp_regression": ("mlp_regression", {"hidden": (5, 4), "activation": "tanh"}, TARGETS),
    "mlp_known": ("mlp_regression", {"hidden": [5], "noise_scale": 0.3, "fan_in_scaling": False}, TARGETS),
    "mlp_no_hidden": ("mlp_regression", {"hidden": (), "noise_prior_scale": 0.5}, TARGETS),
    "mlp_classification": ("mlp_classification", {"hidden": (6,), "num_classes": 4}, LABELS),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=sorted(MODELS))
def case(request):
    """Model of NumPyro, model of Pyro, targets, and values of all the latent sites."""
    name, options, y = MODELS[request.param]
    of_numpyro = getattr(numpyro_models, name)(**options)
    of_pyro = getattr(pyro_models, name)(**options)
    return of_numpyro, of_pyro, y, values_of(of_numpyro, y)


def values_of(model, y):
    """Latent sites with arbitrary values (the prior's, moved a little)."""
    trace = numpyro.handlers.trace(numpyro.handlers.seed(model, random.key(1))).get_trace(X, y)
    sites = {k: s["value"] for k, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    return {k: np.asarray(v) * 1.1 + 0.05 for k, v in sites.items()}


def numpyro_log_density(model, values, x, y, rows=None, **kwargs):
    if rows is not None:
        model = numpyro.handlers.substitute(model, {"data": jnp.asarray(rows)})
    model = numpyro.handlers.seed(model, random.key(0))
    return float(log_density(model, (x, y), kwargs, {k: jnp.asarray(v) for k, v in values.items()})[0])


def pyro_log_density(model, values, x, y, rows=None, **kwargs):
    data = {k: torch.tensor(v) for k, v in values.items()}
    if rows is not None:
        data["data"] = torch.tensor(rows)
    trace = poutine.trace(poutine.condition(model, data)).get_trace(torch.tensor(x), torch.tensor(y), **kwargs)
    return trace.log_prob_sum().item()


def test_log_density_agrees(case):
    of_numpyro, of_pyro, y, values = case
    expected = numpyro_log_density(of_numpyro, values, X, y)
    assert pyro_log_density(of_pyro, values, X, y) == pytest.approx(expected, rel=0, abs=1e-10)
    rows = [7, 2, 5]
    expected = numpyro_log_density(of_numpyro, values, X, y, rows, subsample_size=3)
    of_torch = pyro_log_density(of_pyro, values, X, y, rows, subsample_size=3)
    assert of_torch == pytest.approx(expected, rel=0, abs=1e-10)


@pytest.mark.parametrize("activation", checks.ACTIVATIONS)
def test_activations_agree(activation):
    options = {"hidden": (4, 3), "activation": activation, "noise_scale": 0.5}
    of_numpyro = numpyro_models.mlp_regression(**options)
    values = {k: 15 * v for k, v in values_of(of_numpyro, TARGETS).items()}  # out to the tails
    expected = of_numpyro.forward({k: jnp.asarray(v) for k, v in values.items()}, jnp.asarray(X))
    of_pyro = pyro_models.mlp_regression(**options)
    found = of_pyro.forward({k: torch.tensor(v) for k, v in values.items()}, torch.tensor(X))
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-10)


def by_hand(name, options, values, y):
    """Log density in NumPy and SciPy alone."""
    scale = options.get("prior_scale", 1.0)
    total, h = 0.0, X
    for site, value in values.items():
        if site == "noise_scale":
            total += halfnorm.logpdf(value, scale=options.get("noise_prior_scale", 1.0))
        elif site[0] == "w" and name.startswith("mlp") and options.get("fan_in_scaling", True):
            total += norm.logpdf(value, scale=scale / np.sqrt(value.shape[0])).sum()
        else:
            total += norm.logpdf(value, scale=scale).sum()
    if name.startswith("mlp"):
        depth = len(options["hidden"])
        for i in range(depth):
            h = h @ values[f"w{i}"] + values[f"b{i}"]
            h = np.tanh(h) if options.get("activation") == "tanh" else np.maximum(h, 0)
        out = h @ values[f"w{depth}"] + values[f"b{depth}"]
    else:
        out = X @ values["w"] + values["b"]
    if "regression" in name and "logistic" not in name:
        noise = options.get("noise_scale", values.get("noise_scale"))
        return total + norm.logpdf(y, out.reshape(N), noise).sum()
    if out.ndim == 1:
        out = np.stack([np.zeros(N), out], axis=1)
    return total + (out[np.arange(N), y] - logsumexp(out, axis=1)).sum()


@pytest.mark.parametrize("key", sorted(MODELS))
def test_log_density_by_hand(key):
    name, options, y = MODELS[key]
    model = getattr(numpyro_models, name)(**options)
    values = values_of(model, y)
    expected = by_hand(name, options, values, y)
    assert numpyro_log_density(model, values, X, y) == pytest.approx(expected, rel=0, abs=1e-10)


def test_minibatches_average_to_the_full_data(case):
    of_numpyro, of_pyro, y, values = case
    batches = np.random.default_rng(3).permutation(N).reshape(4, 3)
    for model, log_density_of in ((of_numpyro, numpyro_log_density), (of_pyro, pyro_log_density)):
        full = log_density_of(model, values, X, y)
        parts = [log_density_of(model, values, X, y, rows, subsample_size=3) for rows in batches]
        assert np.mean(parts) == pytest.approx(full, rel=0, abs=1e-10)
        assert np.std(parts) > 0.01


def test_sites(case):
    of_numpyro, of_pyro, y, values = case
    trace = numpyro.handlers.trace(numpyro.handlers.seed(of_numpyro, random.key(0))).get_trace(X, y)
    of_torch = poutine.trace(of_pyro).get_trace(torch.tensor(X), torch.tensor(y))
    latent = {k: tuple(s["value"].shape) for k, s in of_torch.nodes.items() if k in values}
    assert latent == {k: v.shape for k, v in values.items()}
    assert [k for k in trace if k in values] == list(values)
    assert {k for k, s in trace.items() if s["type"] == "deterministic"} == set()
    assert set(of_torch.stochastic_nodes) - {"data"} == set(values)
    assert trace["data"]["type"] == "plate"
    for k in values:  # outside the plate
        assert trace[k]["cond_indep_stack"] == []
        assert of_torch.nodes[k]["cond_indep_stack"] == ()
        assert of_torch.nodes[k]["value"].dtype == torch.float64
        assert trace[k]["value"].dtype == jnp.float64
    assert trace["y"]["cond_indep_stack"][0].name == "data"
    assert of_torch.nodes["y"]["cond_indep_stack"][0].name == "data"


def test_prior_draws(case):
    """With y=None both backends sample y, of N values or of a minibatch's."""
    of_numpyro, of_pyro, y, _ = case
    for size, count in ((None, N), (5, 5)):
        drawn = numpyro.handlers.seed(of_numpyro, random.key(2))(X, subsample_size=size)
        of_torch = of_pyro(torch.tensor(X), subsample_size=size)
        assert drawn.shape == (count,)
        assert of_torch.shape == (count,)
        for value in (np.asarray(drawn), of_torch.numpy()):
            assert np.isfinite(value).all()
            if y.dtype.kind == "i":
                assert set(np.unique(value)) <= set(range(4))


def test_prior_spread():
    """Weights have standard deviation prior_scale / sqrt(fan_in), in draws too."""
    pyro.set_rng_seed(0)
    of_numpyro = numpyro_models.mlp_classification((400,), prior_scale=2.0)
    of_pyro = pyro_models.mlp_classification((400,), prior_scale=2.0)
    x = np.ones((2, 100))
    trace = numpyro.handlers.trace(numpyro.handlers.seed(of_numpyro, random.key(0))).get_trace(x)
    of_torch = poutine.trace(of_pyro).get_trace(torch.tensor(x))
    for site, expected in (("w0", 0.2), ("b0", 2.0), ("w1", 0.1)):
        z = 4 / np.sqrt(2 * trace[site]["value"].size)
        assert np.std(trace[site]["value"]) == pytest.approx(expected, rel=z)
        assert of_torch.nodes[site]["value"].std().item() == pytest.approx(expected, rel=z)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_conjugate_posterior(temperature):
    """Gradient and Hessian of the model's own log density give the mean and covariance."""
    options = {"noise_scale": 0.3, "prior_scale": 2.0}
    mean, covariance = conjugate.linear_regression_posterior(X, TARGETS, temperature=temperature, **options)
    model = numpyro_models.linear_regression(**options)

    def energy(theta):
        sites = {"w": theta[:D], "b": theta[D]}
        return -log_density(model, (X, TARGETS), {}, sites)[0] / temperature

    np.testing.assert_allclose(jax.grad(energy)(jnp.asarray(mean)), 0, atol=1e-8)
    precision = jax.hessian(energy)(jnp.zeros(D + 1))
    np.testing.assert_allclose(np.linalg.inv(precision), covariance, rtol=1e-9)


def test_conjugate_posterior_by_brute_force():
    """One weight and an intercept on a grid, in NumPy alone."""
    x, y = X[:, :1], TARGETS
    mean, covariance = conjugate.linear_regression_posterior(x, y, noise_scale=0.5, prior_scale=0.8)
    sd = np.sqrt(np.diag(covariance))
    w, b = (np.linspace(m - 8 * s, m + 8 * s, 401) for m, s in zip(mean, sd, strict=True))
    grid = np.stack(np.meshgrid(w, b, indexing="ij"), axis=-1).reshape(-1, 2)
    logs = norm.logpdf(grid, scale=0.8).sum(-1)
    logs += norm.logpdf(y, grid[:, :1] * x[:, 0] + grid[:, 1:], 0.5).sum(-1)
    weight = np.exp(logs - logs.max())
    weight /= weight.sum()
    np.testing.assert_allclose(weight @ grid, mean, atol=1e-9)
    centred = grid - weight @ grid
    np.testing.assert_allclose((weight[:, None] * centred).T @ centred, covariance, rtol=1e-8)


def test_same_public_interface():
    assert numpyro_models.__all__ == pyro_models.__all__
    for name in numpyro_models.__all__:
        ours, theirs = getattr(numpyro_models, name), getattr(pyro_models, name)
        if inspect.isclass(theirs) and issubclass(theirs, torch.nn.Module):
            arguments = dict(inspect.signature(ours.__init__).parameters)
            assert arguments.pop("rngs").kind is inspect.Parameter.KEYWORD_ONLY  # nnx's own
            assert arguments == dict(inspect.signature(theirs.__init__).parameters)
            continue
        assert inspect.signature(ours).parameters == inspect.signature(theirs).parameters
        if inspect.isclass(ours):
            assert str(inspect.signature(ours.__call__)) == str(inspect.signature(theirs.__call__))
            assert str(inspect.signature(ours.forward)) == str(inspect.signature(theirs.forward))


def test_pickles_and_hashes(case):
    for model in case[:2]:
        assert pickle.loads(pickle.dumps(model)) == model
        assert hash(model) == hash(pickle.loads(pickle.dumps(model)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_integer_inputs(dtype):
    """Integers give the same density as the same numbers in the default float."""
    x = (np.arange(N * D).reshape(N, D) % 5).astype(dtype)
    for name, options, y in MODELS.values():
        of_numpyro = getattr(numpyro_models, name)(**options)
        values = values_of(of_numpyro, y)
        expected = numpyro_log_density(of_numpyro, values, x.astype(float), y)
        assert numpyro_log_density(of_numpyro, values, x, y) == pytest.approx(expected, abs=1e-10)
        of_pyro = getattr(pyro_models, name)(**options)
        trace = poutine.trace(of_pyro).get_trace(torch.tensor(x), torch.tensor(y))
        latent = [trace.nodes[k]["value"] for k in values]
        assert {v.dtype for v in latent} == {torch.get_default_dtype()}
        data = {k: v.astype(np.float32) for k, v in values.items()}
        assert pyro_log_density(of_pyro, data, x, y) == pytest.approx(expected, rel=1e-4, abs=1e-2)


def test_float32_stays_float32():
    x = X.astype(np.float32)
    with jax.enable_x64(False):
        model = numpyro.handlers.seed(numpyro_models.mlp_regression((4,)), random.key(0))
        trace = numpyro.handlers.trace(model).get_trace(x, TARGETS)
        assert {trace[k]["value"].dtype for k in ("w0", "b0", "noise_scale", "y")} == {np.dtype("float32")}
    trace = poutine.trace(pyro_models.mlp_regression((4,))).get_trace(torch.tensor(x), torch.tensor(TARGETS))
    assert {trace.nodes[k]["value"].dtype for k in ("w0", "b0", "noise_scale", "y")} == {torch.float32}


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, bool])
def test_label_dtypes(dtype):
    of_numpyro, of_pyro = numpyro_models.logistic_regression(), pyro_models.logistic_regression()
    values = values_of(of_numpyro, BINARY)
    expected = numpyro_log_density(of_numpyro, values, X, BINARY)
    y = BINARY.astype(dtype)
    assert numpyro_log_density(of_numpyro, values, X, y) == pytest.approx(expected, abs=1e-12)
    assert pyro_log_density(of_pyro, values, X, y) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("plate_dimension", [False, True])
def test_pyro_many_draws_at_once(case, plate_dimension):
    """As many draws as rows, where wrong broadcasting would pass unseen; as guides and chains shape them."""
    _, of_pyro, _, values = case
    x = torch.tensor(X)
    factors = torch.linspace(0.5, 2.0, N, dtype=torch.float64)
    single = [{k: torch.tensor(v) * factor for k, v in values.items()} for factor in factors]
    draws = {k: torch.stack([values[k] for values in single]) for k in values}
    given = {k: v.unsqueeze(1) for k, v in draws.items()} if plate_dimension else draws
    predictive = pyro.infer.Predictive(of_pyro, given, parallel=True, return_sites=["y"])
    assert predictive(x)["y"].shape == (N, N)
    together = predictive.get_vectorized_trace(x).nodes["y"]["fn"]
    for i, values in enumerate(single):
        alone = poutine.trace(poutine.condition(of_pyro, values)).get_trace(x).nodes["y"]["fn"]
        if hasattr(alone, "logits"):
            torch.testing.assert_close(together.logits[i], alone.logits)
        else:
            torch.testing.assert_close(together.loc[i], alone.loc)
            torch.testing.assert_close(together.scale[i], alone.scale)


def test_hosts_run_the_models():
    """HMC and a guide of each host on a small network."""
    x, y = X[:, :2], TARGETS
    of_numpyro = numpyro_models.mlp_regression((2,), activation="tanh")
    kernel = numpyro.infer.HMC(of_numpyro, trajectory_length=0.1)  # compiles much faster than NUTS
    mcmc = numpyro.infer.MCMC(kernel, num_warmup=5, num_samples=5, progress_bar=False)
    mcmc.run(random.key(0), x, y)
    drawn = numpyro.infer.Predictive(of_numpyro, mcmc.get_samples())(random.key(1), x)
    assert drawn["y"].shape == (5, N)
    guide = numpyro.infer.autoguide.AutoNormal(of_numpyro)
    svi = numpyro.infer.SVI(of_numpyro, guide, numpyro.optim.Adam(0.01), numpyro.infer.Trace_ELBO())
    result = svi.run(random.key(0), 3, x, y, subsample_size=4, progress_bar=False)
    assert np.isfinite(result.losses).all()

    x, y = torch.tensor(x), torch.tensor(y)
    of_pyro = pyro_models.mlp_regression((2,), activation="tanh")
    mcmc = pyro.infer.MCMC(pyro.infer.HMC(of_pyro, num_steps=2), num_samples=3, warmup_steps=2, disable_progbar=True)
    mcmc.run(x, y)
    drawn = pyro.infer.Predictive(of_pyro, mcmc.get_samples())(x)
    assert drawn["y"].shape == (3, N)
    pyro.clear_param_store()
    guide = pyro.infer.autoguide.AutoNormal(of_pyro)
    elbo = pyro.infer.Trace_ELBO(num_particles=3, vectorize_particles=True)
    svi = pyro.infer.SVI(of_pyro, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    assert np.isfinite(svi.step(x, y, subsample_size=4))


def test_gradient_of_the_network():
    """The density can be differentiated, with subsampling, in both backends alike."""
    _, options, y = MODELS["mlp_regression"]
    of_numpyro, of_pyro = numpyro_models.mlp_regression(**options), pyro_models.mlp_regression(**options)
    values, rows = values_of(of_numpyro, y), [1, 4, 9]

    def potential(w0):
        model = numpyro.handlers.substitute(of_numpyro, {"data": jnp.asarray(rows)})
        sites = {**values, "w0": w0}
        return log_density(numpyro.handlers.seed(model, 0), (X, y), {"subsample_size": 3}, sites)[0]

    expected = jax.grad(potential)(jnp.asarray(values["w0"]))
    numeric = approx_fprime(
        values["w0"].ravel(),
        lambda w: numpyro_log_density(of_numpyro, {**values, "w0": w.reshape(D, 5)}, X, y, rows, subsample_size=3),
    )
    np.testing.assert_allclose(np.ravel(expected), numeric, rtol=1e-3, atol=1e-3)
    sites = {k: torch.tensor(v, requires_grad=True) for k, v in values.items()}
    model = poutine.condition(of_pyro, {**sites, "data": torch.tensor(rows)})
    trace = poutine.trace(model).get_trace(torch.tensor(X), torch.tensor(y), subsample_size=3)
    trace.log_prob_sum().backward()
    np.testing.assert_allclose(sites["w0"].grad, expected, rtol=1e-9, atol=1e-9)
