"""SVI of both hosts behind one interface, and a model of which the evidence is known."""

from types import SimpleNamespace

import jax
import numpy as np
import numpyro
import numpyro.distributions
import numpyro.infer
import optax
import pyro
import pyro.distributions
import pyro.infer
import torch
from numpyro.infer import autoguide as numpyro_guides
from pyro.infer import autoguide as pyro_guides

N, B = 12, 4
X = np.random.default_rng(0).normal(size=(N, 2)).astype(np.float32)
Y = (X @ [1.0, -0.5] + np.random.default_rng(1).normal(size=N)).astype(np.float32)
NOISE = 0.7


def train_numpyro(model, guide, args, kwargs=None, params=None, steps=3, cls=numpyro.infer.SVI, rate=0.0):
    """SVI and what to_arviz takes of it; `params` are put in the place of what was trained."""
    svi = cls(model, guide, optax.adam(rate), numpyro.infer.Trace_ELBO())
    result = svi.run(jax.random.key(0), steps, *args, **kwargs or {}, progress_bar=False)
    params = {name: jax.numpy.asarray(value, np.float32) for name, value in (params or {}).items()}
    assert set(params) <= set(result.params), result.params
    return svi, {"svi_result": result._replace(params=result.params | params)}


def train_pyro(model, guide, args, kwargs=None, params=None, steps=3, cls=pyro.infer.SVI, rate=0.0):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = cls(model, guide, pyro.optim.Adam({"lr": rate}), pyro.infer.Trace_ELBO())
    losses = [svi.step(*args, **kwargs or {}) for _ in range(steps)]
    store = pyro.get_param_store()
    for name, value in (params or {}).items():
        assert name in store, list(store)
        free = torch.distributions.transform_to(store._constraints[name]).inv(torch.tensor(value, dtype=torch.float32))
        store._params[name].data.copy_(free)  # in place, for a module has the same tensor
    return svi, {"losses": losses}


HOSTS = {
    "numpyro": SimpleNamespace(
        name="numpyro",
        ppl=numpyro,
        dist=numpyro.distributions,
        guides=numpyro_guides,
        array=lambda x: jax.numpy.asarray(x, np.float32),
        train=train_numpyro,
        SVI=numpyro.infer.SVI,
        deterministic=numpyro.deterministic,
    ),
    "pyro": SimpleNamespace(
        name="pyro",
        ppl=pyro,
        dist=pyro.distributions,
        guides=pyro_guides,
        array=lambda x: torch.tensor(x, dtype=torch.float32),
        train=train_pyro,
        SVI=pyro.infer.SVI,
        deterministic=pyro.deterministic,
    ),
}


def data(host):
    return host.array(X), host.array(Y)


def linear(host):
    """Bayesian linear regression with known noise: the posterior and the evidence are Gaussian."""
    ppl, dist, array = host.ppl, host.dist, host.array

    def model(x, y, size=None):
        w = ppl.sample("w", dist.Normal(array(0.0), array(1.0)).expand([2]).to_event(1))
        ppl.deterministic("total", w.sum())
        with ppl.plate("data", N, subsample_size=size):
            x, y = ppl.subsample(x, event_dim=1), ppl.subsample(y, event_dim=0)
            ppl.sample("y", dist.Normal(x @ w, array(NOISE)), obs=y)

    return model


def posterior_of_linear():
    """Mean, covariance and log evidence, in float64."""
    x, y = X.astype(float), Y.astype(float)
    covariance = np.linalg.inv(np.eye(2) + x.T @ x / NOISE**2)
    marginal = x @ x.T + NOISE**2 * np.eye(N)
    evidence = -0.5 * (y @ np.linalg.solve(marginal, y) + np.linalg.slogdet(marginal)[1] + N * np.log(2 * np.pi))
    return covariance @ x.T @ y / NOISE**2, covariance, evidence


def full_covariance(host, mean, covariance):
    """A guide written by hand, N(mean, covariance), whose mean is a param."""
    ppl, dist, array = host.ppl, host.dist, host.array

    def guide(x, y, size=None):
        loc = ppl.param("loc", array(mean))
        ppl.sample("w", dist.MultivariateNormal(loc, scale_tril=array(np.linalg.cholesky(covariance))))

    return guide


def log_normal(host):
    """A positive site whose logarithm is Gaussian under the posterior."""
    ppl, dist, array = host.ppl, host.dist, host.array
    log = jax.numpy.log if host.name == "numpyro" else torch.log

    def model(y):
        s = ppl.sample("s", dist.LogNormal(array(0.0), array(1.0)))
        with ppl.plate("data", N):
            ppl.sample("y", dist.Normal(log(s), array(NOISE)), obs=y)

    return model


def posterior_of_log_normal():
    """Mean and standard deviation of log s, and the log evidence."""
    y = Y.astype(float)
    variance = 1 / (1 + N / NOISE**2)
    marginal = np.ones((N, N)) + NOISE**2 * np.eye(N)
    evidence = -0.5 * (y @ np.linalg.solve(marginal, y) + np.linalg.slogdet(marginal)[1] + N * np.log(2 * np.pi))
    return variance * y.sum() / NOISE**2, variance**0.5, evidence


def auto_params(host, kind, mean, sd):
    """Params of an automatic guide of the site s, by the names that the host gives them."""
    names = {
        ("numpyro", "AutoNormal"): ("s_auto_loc", "s_auto_scale"),
        ("numpyro", "AutoDiagonalNormal"): ("auto_loc", "auto_scale"),
        ("pyro", "AutoNormal"): ("AutoNormal.locs.s", "AutoNormal.scales.s"),
        ("pyro", "AutoDiagonalNormal"): ("AutoDiagonalNormal.loc", "AutoDiagonalNormal.scale"),
    }[host.name, kind]
    values = (mean, sd) if kind == "AutoNormal" else ([mean], [sd])
    return dict(zip(names, values, strict=True))
