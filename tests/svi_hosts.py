"""SVI of both hosts behind one interface, and a model of which the evidence is known."""

from functools import cache
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
import xarray as xr
from numpyro.infer import autoguide as numpyro_guides
from pyro.infer import autoguide as pyro_guides

from bnn_ppl import to_arviz

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


def trained(host, kind="AutoNormal", size=None):
    """Model, SVI, and what to_arviz takes of it; compiled runs of NumPyro are shared, and Pyro trains anew."""
    return _trained_once(kind, size) if host.name == "numpyro" else _trained(host, kind, size)


def _trained(host, kind, size):
    model = linear(host)
    return model, *host.train(model, getattr(host.guides, kind)(model), data(host), {"size": size})


@cache
def _trained_once(kind, size):
    return _trained(HOSTS["numpyro"], kind, size)


def groups_of(tree):
    names = tree.children if isinstance(tree, xr.DataTree) else tree.groups()
    return {name: tree[name].to_dataset() if isinstance(tree, xr.DataTree) else tree[name] for name in names}


def exported(host, guide=None, model=None, params=None, size=None, num_samples=50, **settings):
    """Groups of the linear regression."""
    if guide is None and model is None:
        _, svi, given = trained(host, size=size)
    else:
        model = model or linear(host)
        guide = guide or host.guides.AutoNormal(model)
        svi, given = host.train(model, guide, data(host), {"size": size}, params)
    found = {"model_args": data(host), "model_kwargs": {"size": size}, "num_samples": num_samples}
    return groups_of(to_arviz(svi, **(given | found | settings)))


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


def averaging(host):
    """Stand-ins for the classes that average: one of a guide, one of snapshots."""
    mean, covariance, _ = posterior_of_linear()

    class Averaged(host.SVI):
        def averaged_guide(self, *state):
            assert len(state) == (host.name == "numpyro")

            def guide(x, y, size=None):
                value = host.array(mean)
                host.ppl.sample(
                    "_latent", host.dist.Normal(value, host.array(1.0)).to_event(1), infer={"is_auxiliary": True}
                )
                host.ppl.sample(
                    "w", host.dist.MultivariateNormal(value, scale_tril=host.array(np.linalg.cholesky(covariance)))
                )

            return guide

        def averaged_params(self, *state):
            return {"offset": host.array(0.0)}

        def averaging_weights(self, *state):
            return np.array([0.2, 0.3, 0.5])

        def snapshot_steps(self, *state):
            return np.array([10, 20, 30])

    class Snapshots(host.SVI):
        def snapshots(self, *arguments, size=None):
            assert len(arguments) == 2 + (host.name == "numpyro")
            return {"w": host.array(np.arange(6.0).reshape(3, 2))}

        def averaging_weights(self, *state):
            return np.array([0.2, 0.3, 0.5])

    return Averaged, Snapshots


def with_offset(host):
    """The linear regression with a param, which is 0 in averages and 1 elsewhere."""
    ppl, dist = host.ppl, host.dist

    def model(x, y, size=None):
        offset = ppl.param("offset", host.array(1.0))
        w = ppl.sample("w", dist.Normal(host.array(0.0), host.array(1.0)).expand([2]).to_event(1))
        ppl.deterministic("total", w.sum())
        with ppl.plate("data", N):
            ppl.sample("y", dist.Normal(x @ w + offset, host.array(NOISE)), obs=y)

    return model


# A program that prints by how many MB its memory grows.
MEMORY = """
    import resource
    from bnn_ppl import to_arviz
    WEIGHTS, DRAWS = 400_000, 150  # together 240 MB in single precision

    def model(y):
        w = ppl.sample("w", dist.Normal(zero, one).expand([WEIGHTS]).to_event(1))
        with ppl.plate("data", 6, subsample_size=2):
            ppl.sample("y", dist.Normal(w.mean(), one), obs=ppl.subsample(y, event_dim=0))

    def guide(y):
        loc = ppl.param("loc", zeros)
        ppl.sample("w", dist.Normal(loc, one).to_event(1))

    svi, given = train(model, guide, y)
    to_arviz(svi, model_args=(y,), num_samples=2, **given)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    to_arviz(svi, model_args=(y,), num_samples=DRAWS, var_names=[], log_likelihood=True, **given)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
TRAIN = {
    "numpyro": """
    import jax, optax, numpyro as ppl, numpyro.distributions as dist
    from numpyro.infer import SVI, Trace_ELBO
    zero, one, zeros, y = 0.0, 1.0, jax.numpy.zeros(400_000), jax.numpy.ones(6)

    def train(model, guide, y):
        svi = SVI(model, guide, optax.sgd(0.0), Trace_ELBO())
        return svi, {"svi_result": svi.run(jax.random.key(0), 1, y, progress_bar=False)}
    """,
    "pyro": """
    import torch, pyro as ppl, pyro.distributions as dist
    from pyro.infer import SVI, Trace_ELBO
    zero, one, zeros, y = torch.tensor(0.0), torch.tensor(1.0), torch.zeros(400_000), torch.ones(6)

    def train(model, guide, y):
        svi = SVI(model, guide, ppl.optim.SGD({"lr": 0.0}), Trace_ELBO())
        svi.step(y)
        return svi, {}
    """,
}
