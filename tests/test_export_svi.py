"""to_arviz of guides that SVI trained: laws of the draws and of the ELBO, groups, averages and memory."""

import subprocess
import sys
import textwrap
import warnings

import arviz as az
import jax
import matplotlib
import numpy as np
import numpyro.infer
import optax
import pyro.infer
import pytest
import torch
import xarray as xr

import bnn_ppl.numpyro
import bnn_ppl.pyro
from bnn_ppl import report, svi_arguments, to_arviz
from tests.svi_hosts import (
    HOSTS,
    MEMORY,
    NOISE,
    TRAIN,
    B,
    N,
    X,
    Y,
    auto_params,
    averaging,
    data,
    exported,
    full_covariance,
    groups_of,
    linear,
    log_normal,
    posterior_of_linear,
    posterior_of_log_normal,
    trained,
    with_offset,
)

matplotlib.use("Agg")


@pytest.fixture(params=list(HOSTS))
def host(request):
    return HOSTS[request.param]


# The ELBO


def test_elbo_of_the_posterior_is_the_evidence(host):
    mean, covariance, evidence = posterior_of_linear()
    elbo = exported(host, full_covariance(host, mean, covariance))["sample_stats"]["elbo"]
    assert elbo.shape == (1, 50)
    np.testing.assert_allclose(elbo, evidence, rtol=2e-6)


@pytest.mark.parametrize("kind", ["AutoNormal", "AutoDiagonalNormal"])
def test_elbo_of_a_positive_site(host, kind):
    mean, sd, evidence = posterior_of_log_normal()
    model, args = log_normal(host), data(host)[1:]
    guide = getattr(host.guides, kind)(model)
    svi, given = host.train(model, guide, args, params=auto_params(host, kind, mean, sd))
    groups = groups_of(to_arviz(svi, model_args=args, num_samples=400, **given))
    np.testing.assert_allclose(groups["sample_stats"]["elbo"], evidence, rtol=5e-6)
    assert set(groups["posterior"].data_vars) == {"s"}  # no auxiliary sites
    log_s = np.log(groups["posterior"]["s"].values[0])
    assert abs(log_s.mean() - mean) < 4 * sd / 400**0.5
    assert abs(log_s.var() / sd**2 - 1) < 4 * (2 / 400) ** 0.5


@pytest.mark.parametrize("size", [None, B])
def test_mean_of_the_elbo_is_the_evidence_less_the_divergence(host, size):
    mean, covariance, evidence = posterior_of_linear()
    shift, scale = np.array([0.3, -0.2]), 1.5
    divergence = 0.5 * (2 * scale - 2 - 2 * np.log(scale) + shift @ np.linalg.solve(covariance, shift))
    stats = exported(host, full_covariance(host, mean + shift, scale * covariance), size=size, num_samples=1000)
    elbo = stats["sample_stats"]["elbo" if size is None else "elbo_minibatch"].values[0]
    assert abs(elbo.mean() - (evidence - divergence)) < 4 * elbo.std() / 1000**0.5


@pytest.mark.parametrize("size", [None, B])
@pytest.mark.parametrize("kind", ["AutoNormal", "AutoMultivariateNormal"])
def test_mean_of_the_elbo_is_that_of_the_host(host, kind, size):
    model, svi, given = trained(host, kind, size)
    arguments = {"model_args": data(host), "model_kwargs": {"size": size}, "num_samples": 500}
    stats = groups_of(to_arviz(svi, **given, **arguments))["sample_stats"]
    elbo = stats["elbo" if size is None else "elbo_minibatch"].values[0]
    if host.name == "numpyro":
        loss = numpyro.infer.Trace_ELBO(num_particles=500)
        compiled = jax.jit(
            lambda params: loss.loss(jax.random.key(5), params, model, svi.guide, *data(host), size=size)
        )
        theirs = -float(compiled(given["svi_result"].params))
    else:
        loss = pyro.infer.Trace_ELBO(num_particles=500)
        pyro.set_rng_seed(5)
        theirs = -loss.loss(model, svi.guide, *data(host), size=size)
    assert abs(elbo.mean() - theirs) < 4 * elbo.std() * (2 / 500) ** 0.5 + 1e-4


def test_elbo_of_a_point_is_the_joint_density(host):
    groups = exported(host, host.guides.AutoDelta(linear(host)))
    w = groups["posterior"]["w"].values[0, 0].astype(float)
    joint = -0.5 * (w @ w + 2 * np.log(2 * np.pi))
    joint -= 0.5 * (((Y - X @ w) / NOISE) ** 2).sum() + N * np.log(NOISE * (2 * np.pi) ** 0.5)
    np.testing.assert_allclose(groups["sample_stats"]["elbo"], joint, rtol=1e-5)


def test_laplace_approximation(host):
    """Its draws are of the posterior, where that is Gaussian, and its mean is trained."""
    mean, covariance, evidence = posterior_of_linear()
    model = linear(host)
    guide = host.guides.AutoLaplaceApproximation(model)
    svi, given = host.train(
        model,
        guide,
        data(host),
        params={"AutoLaplaceApproximation.loc": mean} if host.name == "pyro" else {"auto_loc": mean},
    )
    if host.name == "pyro":
        svi.guide = guide.laplace_approximation(*data(host))
    groups = groups_of(to_arviz(svi, model_args=data(host), num_samples=500, **given))
    np.testing.assert_allclose(groups["sample_stats"]["elbo"], evidence, rtol=1e-4)
    found = np.cov(groups["posterior"]["w"].values[0].T)
    np.testing.assert_allclose(found, covariance, atol=4 * covariance.max() * (2 / 500) ** 0.5)


def test_elbo_under_local_reparameterization_is_that_of_the_draw(host):
    library = bnn_ppl.numpyro if host.name == "numpyro" else bnn_ppl.pyro
    ppl, dist = host.ppl, host.dist

    def model(x, y, size=None):
        w = ppl.sample("w", dist.Normal(host.array(0.0), host.array(1.0)).expand([2, 1]).to_event(2))
        mean = x @ w if host.name == "numpyro" else torch.nn.functional.linear(x, w.T)
        with ppl.plate("data", N):
            ppl.sample("y", dist.Normal(mean[:, 0], host.array(NOISE)), obs=y)

    guide = host.guides.AutoNormal(model)
    plain, given = host.train(model, guide, data(host))
    if host.name == "numpyro":
        guide = bnn_ppl.numpyro.AutoVariationalDropout(model)
    else:
        guide = bnn_ppl.pyro.AutoVariationalDropout(model)
    svi, given = host.train(*library.local_reparameterization(model, guide), data(host))
    groups = groups_of(to_arviz(svi, model_args=data(host), num_samples=20, log_likelihood=True, **given))
    plain = host.SVI(
        model, guide, svi.optim, numpyro.infer.Trace_ELBO() if host.name == "numpyro" else pyro.infer.Trace_ELBO()
    )
    expected = groups_of(to_arviz(plain, model_args=data(host), num_samples=20, log_likelihood=True, **given))
    for name in ("posterior", "sample_stats", "log_likelihood"):
        xr.testing.assert_allclose(groups[name], expected[name], rtol=1e-5)
        assert groups[name].attrs == expected[name].attrs
    assert groups["posterior"].attrs["guide"] == "AutoVariationalDropout"


# Draws and groups


def test_both_hosts_give_the_same_structure():
    found = []
    for host in HOSTS.values():
        groups = exported(host, size=B, log_likelihood=True, posterior_predictive=True)
        found.append(
            {
                name: (
                    {n: (v.dims, v.shape) for n, v in group.data_vars.items()},
                    {n: v.values.tolist() for n, v in group.coords.items()},
                    set(group.attrs),
                )
                for name, group in groups.items()
            }
        )
    assert found[0] == found[1]
    assert found[0]["posterior"][0] == {
        "w": (("chain", "draw", "w_dim_0"), (1, 50, 2)),
        "total": (("chain", "draw"), (1, 50)),
    }
    assert found[0]["sample_stats"][0] == {"elbo_minibatch": (("chain", "draw"), (1, 50))}
    assert found[0]["log_likelihood"][0] == {"y": (("chain", "draw", "data"), (1, 50, N))}
    assert found[0]["posterior_predictive"][0] == {"y": (("chain", "draw", "data"), (1, 50, N))}
    assert found[0]["observed_data"][0] == {"y": (("data",), (N,))}
    assert found[0]["constant_data"][0] == {"x": (("data", "x_dim_1"), (N, 2))}
    assert found[0]["svi"] == (
        {"elbo": (("step",), (3,))},
        {"step": [1, 2, 3]},
        {"inference_library", "inference_library_version"},
    )
    assert set(found[0]["posterior"][2]) == {"guide", "loss", "inference_library", "inference_library_version"}


def test_number_of_draws_by_default(host):
    assert exported(host, num_samples=None)["posterior"].sizes["draw"] == 1000


@pytest.mark.parametrize("size", [None, B])
def test_log_likelihood_belongs_to_its_draw_and_row(host, size):
    groups = exported(host, size=size, log_likelihood=True, rows=[7, 2, 11], batch_size=None)
    w = groups["posterior"]["w"].values
    residual = (Y - np.einsum("nk,cdk->cdn", X, w))[..., [7, 2, 11]] / NOISE
    expected = -0.5 * residual**2 - np.log(NOISE * (2 * np.pi) ** 0.5)
    np.testing.assert_allclose(groups["log_likelihood"]["y"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(groups["posterior"]["total"], w.sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(groups["observed_data"]["y"], Y)


def test_predictions_belong_to_their_draw(host):
    mean, covariance, _ = posterior_of_linear()
    groups = exported(host, full_covariance(host, mean, covariance), size=B, num_samples=400, posterior_predictive=True)
    noise = groups["posterior_predictive"]["y"].values - np.einsum("nk,cdk->cdn", X, groups["posterior"]["w"].values)
    assert abs(noise.mean()) < 4 * NOISE / noise.size**0.5
    assert abs(noise.var() / NOISE**2 - 1) < 4 * (2 / noise.size) ** 0.5


def test_seed(host, monkeypatch):
    _, svi, given = trained(host, size=B)
    states = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002

    def draws(**settings):
        return groups_of(
            to_arviz(svi, model_args=data(host), model_kwargs={"size": B}, **given, num_samples=30, **settings)
        )

    first = draws()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    torch.manual_seed(4)
    monkeypatch.setattr(svi_arguments, "_BATCH_BYTES", 100)  # 7 draws at once
    again = draws(posterior_predictive=True)
    for name in ("posterior", "sample_stats"):
        xr.testing.assert_equal(first[name], again[name])
    assert not np.isin(first["posterior"]["w"], draws(seed=1)["posterior"]["w"]).any()
    chosen = draws(var_names=["total"])["posterior"]
    assert set(chosen.data_vars) == {"total"}
    xr.testing.assert_equal(chosen["total"], first["posterior"]["total"])
    assert "posterior" not in draws(var_names=[])


def test_sites_that_do_not_repeat_in_chunks(host):
    """A chunk makes the draws of the posterior again, whatever the model draws itself."""
    small = exported(host, size=B, log_likelihood=True)["log_likelihood"]["y"]
    large = exported(host, size=B, log_likelihood=True, batch_size=N)["log_likelihood"]["y"]
    np.testing.assert_allclose(small, large, rtol=1e-4, atol=1e-5)


def test_one_batch_has_no_groups_of_data(host):
    ppl, dist = host.ppl, host.dist

    def streamed(x, y, size=None):
        w = ppl.sample("w", dist.Normal(host.array(0.0), host.array(1.0)).expand([2]).to_event(1))
        with ppl.plate("data", 3 * N, subsample_size=len(y)):
            ppl.sample("y", dist.Normal(x @ w, host.array(NOISE)), obs=y)

    groups = exported(host, model=streamed)
    assert set(groups) == {"posterior", "sample_stats", "svi"}
    assert set(groups["sample_stats"].data_vars) == {"elbo_minibatch"}
    with pytest.raises(ValueError, match=r"log_likelihood=True.*one batch as model_args, has no full data"):
        exported(host, model=streamed, log_likelihood=True)
    # Equal observations of all rows are no batch.
    one = host.array(np.ones(N))
    model = linear(host)
    svi, given = host.train(model, host.guides.AutoNormal(model), (data(host)[0], one), {"size": B})
    tree = to_arviz(svi, model_args=(data(host)[0], one), model_kwargs={"size": B}, num_samples=3, **given)
    assert groups_of(tree)["observed_data"]["y"].shape == (N,)


def test_params_of_the_model(host):
    ppl, dist = host.ppl, host.dist

    def model(x, y, size=None):
        noise = ppl.param("noise", host.array(1.0))
        w = ppl.sample("w", dist.Normal(host.array(0.0), host.array(1.0)).expand([2]).to_event(1))
        with ppl.plate("data", N):
            ppl.sample("y", dist.Normal(x @ w, noise), obs=y)

    groups = exported(host, model=model, params={"noise": 0.25}, log_likelihood=True)
    assert set(groups["posterior"].data_vars) == {"w"}
    residual = (Y - np.einsum("nk,cdk->cdn", X, groups["posterior"]["w"].values)) / 0.25
    expected = -0.5 * residual**2 - np.log(0.25 * (2 * np.pi) ** 0.5)
    np.testing.assert_allclose(groups["log_likelihood"]["y"], expected, rtol=1e-3, atol=1e-4)


def test_model_that_looks_at_its_data(host):
    plain = linear(host)

    def model(x, y, size=None):
        if np.asarray(x)[0, 0] > 100:
            raise ValueError
        plain(x, y, size)

    if host.name == "numpyro":  # svi.run itself compiles
        svi = host.SVI(model, host.guides.AutoNormal(model), optax.adam(0.1), numpyro.infer.Trace_ELBO())
        state = svi.init(jax.random.key(0), *data(host))
        tree = to_arviz(svi, svi_result=state, model_args=data(host), num_samples=5, log_likelihood=True)
        assert groups_of(tree)["log_likelihood"]["y"].shape == (1, 5, N)
    else:
        assert exported(host, model=model, log_likelihood=True)["log_likelihood"]["y"].shape == (1, 50, N)


def test_arviz_functions(host, tmp_path):
    mean, covariance, _ = posterior_of_linear()
    model = linear(host)
    svi, given = host.train(model, full_covariance(host, mean, covariance), data(host), {"size": B})
    tree = to_arviz(svi, model_args=data(host), model_kwargs={"size": B}, num_samples=200, log_likelihood=True, **given)
    summary = az.summary(tree)
    assert set(summary.index) == {"w[0]", "w[1]", "total"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loo = az.loo(tree)
        az.plot_trace(tree, var_names=["w"])
    matplotlib.pyplot.close("all")
    assert np.isfinite(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd)
    tree.to_netcdf(tmp_path / "guide.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "guide.nc", engine="h5netcdf") as back:
        for name, group in groups_of(tree).items():
            xr.testing.assert_equal(back[name].to_dataset().load(), group)


def test_state_and_losses_of_numpyro():
    host = HOSTS["numpyro"]
    _, svi, given = trained(host)
    result, arguments = given["svi_result"], {"model_args": data(host), "num_samples": 5}
    whole = groups_of(to_arviz(svi, svi_result=result, **arguments))
    np.testing.assert_allclose(whole["svi"]["elbo"], -np.asarray(result.losses))
    state = groups_of(to_arviz(svi, svi_result=result.state, **arguments))
    xr.testing.assert_equal(whole["posterior"], state["posterior"])
    assert "svi" not in state
    losses = groups_of(to_arviz(svi, svi_result=result.state, losses=list(result.losses), **arguments))
    np.testing.assert_allclose(losses["svi"]["elbo"], whole["svi"]["elbo"])


def test_report_is_that_of_a_guide(host):
    _, svi, given = trained(host)
    tree = to_arviz(svi, model_args=data(host), num_samples=50, **given)
    text = report(tree)
    assert "AutoNormal: 50 independent draws of the guide" in text
    assert f"mean ELBO of the draws: {float(groups_of(tree)['sample_stats']['elbo'].mean()):.6g}" in text
    assert "chain" not in text


# Averages


def test_averaged_guide(host):
    mean, covariance, evidence = posterior_of_linear()
    model = with_offset(host)
    svi, given = host.train(model, host.guides.AutoNormal(model), data(host), cls=averaging(host)[0])
    groups = groups_of(to_arviz(svi, model_args=data(host), num_samples=500, log_likelihood=True, **given))
    stats = groups["sample_stats"]
    assert stats["averaging_weight"].dims == ("snapshot",)
    assert stats["averaging_weight"].values.tolist() == [0.2, 0.3, 0.5]
    assert stats["snapshot"].values.tolist() == [10, 20, 30]
    assert set(groups["posterior"].data_vars) == {"w", "total"}
    w = groups["posterior"]["w"].values[0]
    assert (abs(w.mean(0) - mean) < 4 * (np.diag(covariance) / 500) ** 0.5).all()
    residual = (Y - w @ X.T) / NOISE  # the averaged param is 0
    expected = -0.5 * residual**2 - np.log(NOISE * (2 * np.pi) ** 0.5)
    np.testing.assert_allclose(groups["log_likelihood"]["y"][0], expected, rtol=1e-3, atol=1e-4)
    # log q is that of the auxiliary site too, whose mean is minus its entropy.
    elbo = stats["elbo"].values[0]
    assert abs(elbo.mean() - evidence - (1 + np.log(2 * np.pi))) < 4 * elbo.std() / 500**0.5
    az.summary(to_arviz(svi, model_args=data(host), num_samples=10, **given))


def test_snapshots(host):
    model = linear(host)
    svi, given = host.train(model, host.guides.AutoNormal(model), data(host), cls=averaging(host)[1])
    groups = groups_of(to_arviz(svi, model_args=data(host), log_likelihood=True, posterior_predictive=True, **given))
    w = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(groups["posterior"]["w"], w[None])
    np.testing.assert_array_equal(groups["posterior"]["total"], w.sum(-1)[None])
    assert set(groups["sample_stats"].data_vars) == {"averaging_weight"}
    assert groups["sample_stats"]["averaging_weight"].dims == ("chain", "draw")
    np.testing.assert_array_equal(groups["sample_stats"]["averaging_weight"], [[0.2, 0.3, 0.5]])
    expected = -0.5 * ((Y - w @ X.T) / NOISE) ** 2 - np.log(NOISE * (2 * np.pi) ** 0.5)
    np.testing.assert_allclose(groups["log_likelihood"]["y"][0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"num_samples=3 with an SVI of snapshots.*leave it out"):
        to_arviz(svi, model_args=data(host), num_samples=3, **given)


@pytest.mark.parametrize("name", list(HOSTS))
def test_memory_is_bounded(name, tmp_path):
    code = textwrap.dedent(TRAIN[name]) + textwrap.dedent(MEMORY)
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 80  # a draw takes 1.6 MB
