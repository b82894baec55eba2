"""What to_arviz does alike for both hosts: choice of sites, refusals, ArviZ's functions, files and memory."""

import subprocess
import sys
import textwrap
import types
import warnings
from functools import cache

import arviz as az
import matplotlib
import numpy as np
import pytest
import xarray as xr

from bnn_ppl import to_arviz

matplotlib.use("Agg")
HOSTS = ["numpyro", "pyro"]
N, B = 11, 4
X = np.random.default_rng(0).normal(size=(N, 2)).astype(np.float32)
OLD_ARVIZ = not hasattr(az, "convert_to_datatree")


def model_of(ppl, dist, array):
    def model(x, y, weights):
        w = ppl.sample("w", dist.Normal(array(0.0), array(1.0)).expand([2]).to_event(1))
        with ppl.plate("groups", 3):
            ppl.sample("g", dist.Normal(array(0.0), array(1.0)))
        ppl.deterministic("total", w.sum())
        with ppl.plate("data", N, subsample_size=B):
            x, y = ppl.subsample(x, event_dim=1), ppl.subsample(y, event_dim=0)
            ppl.sample("y", dist.Normal(x @ w, array(1.0)), obs=y)

    return model


@cache
def chains(host):
    """The same model on the same data in both hosts: 2 chains of 100 draws."""
    settings = {"step_size": 0.1, "friction": 2.0, "steps_per_draw": 2}
    if host == "numpyro":
        import jax
        import numpyro
        from numpyro import distributions as dist
        from numpyro.infer import MCMC

        from bnn_ppl.numpyro import SGHMC

        kernel = SGHMC(model_of(numpyro, dist, jax.numpy.array), **settings)
        mcmc = MCMC(kernel, num_warmup=10, num_samples=100, num_chains=2, chain_method="vectorized", progress_bar=False)
        mcmc.run(jax.random.key(0), X, X.sum(1), weights=np.ones(N, np.float32))
    else:
        import pyro
        import torch
        from pyro import distributions as dist
        from pyro.infer import MCMC

        from bnn_ppl.pyro import SGHMC

        pyro.set_rng_seed(0)
        kernel = SGHMC(model_of(pyro, dist, torch.tensor), **settings)
        mcmc = MCMC(kernel, 100, 10, num_chains=2, disable_progbar=True)
        x = torch.tensor(X)
        mcmc.run(x, x.sum(1), weights=torch.ones(N))
    return mcmc


@cache
def tree_of(host):
    return to_arviz(chains(host), log_likelihood=True, posterior_predictive=True)


def datasets(tree):
    """Groups of an InferenceData or a DataTree as Datasets."""
    if isinstance(tree, xr.DataTree):
        return {name: child.to_dataset() for name, child in tree.children.items()}
    return {name: tree[name] for name in tree.groups()}


def structure(tree):
    groups = {}
    for name, group in datasets(tree).items():
        # Pyro's statistics are Python floats, NumPyro's have the dtype of the model.
        variables = {
            n: (v.dims, v.shape, v.dtype.kind if name == "sample_stats" else v.dtype.str)
            for n, v in group.data_vars.items()
        }
        coords = {n: v.values.tolist() for n, v in group.coords.items()}
        groups[name] = (variables, coords, set(group.attrs))
    return groups


def test_both_hosts_give_the_same_structure():
    first, second = (structure(tree_of(host)) for host in HOSTS)
    assert set(first) == {
        "posterior",
        "sample_stats",
        "observed_data",
        "constant_data",
        "log_likelihood",
        "posterior_predictive",
    }
    assert first == second
    assert first["posterior"][0]["g"] == (("chain", "draw", "groups"), (2, 100, 3), "<f4")
    assert first["constant_data"][0] == {
        "x": (("data", "x_dim_1"), (N, 2), "<f4"),
        "weights": (("data",), (N,), "<f4"),
    }


@pytest.mark.parametrize("host", HOSTS)
def test_the_installed_arviz_gets_its_own_kind(host):
    assert isinstance(tree_of(host), az.InferenceData if OLD_ARVIZ else xr.DataTree)


@pytest.mark.parametrize("host", HOSTS)
def test_arviz_functions(host):
    tree = tree_of(host)
    posterior = datasets(tree)["posterior"]
    summary = az.summary(tree)
    assert {f"w[{i}]" for i in range(2)} | {f"g[{i}]" for i in range(3)} | {"total"} == set(summary.index)
    for dataset in (az.rhat(posterior), az.ess(posterior, method="tail", prob=(0.05, 0.95))):
        assert set(dataset.data_vars) == {"w", "g", "total"}
        assert dataset["w"].shape == (2,)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Estimated shape parameter of Pareto")
        loo = az.loo(tree, pointwise=True)
    score = loo.elpd_loo if OLD_ARVIZ else loo.elpd
    assert np.isfinite(score)
    assert loo.loo_i.shape == (N,) if OLD_ARVIZ else loo.elpd_i.shape == (N,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matplotlib and others deprecate is not ours
        az.plot_trace(tree, var_names=["w"])
        az.plot_rank(tree, var_names=["w", "total"])
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("host", HOSTS)
def test_netcdf_round_trip(host, tmp_path):
    tree, path = tree_of(host), tmp_path / "chain.nc"
    tree.to_netcdf(path, engine="h5netcdf")
    with xr.open_datatree(path, engine="h5netcdf") as back:
        for name, group in datasets(tree).items():
            xr.testing.assert_equal(back[name].to_dataset().load(), group)
            for key, value in group.attrs.items():
                assert back[name].attrs[key] == value


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("var_names", "expected"),
    [
        (None, {"w", "g", "total"}),
        ("w", {"w"}),
        (["total", "w"], {"w", "total"}),
        (["~w"], {"g", "total"}),
        ("~w", {"g", "total"}),
        (["w", "g", "~g"], {"w"}),
    ],
)
def test_var_names(host, var_names, expected):
    tree = to_arviz(chains(host), var_names=var_names)
    assert set(tree["posterior"].data_vars) == expected
    assert tree["posterior"].sizes["chain"] == 2
    assert tree["posterior"].sizes["draw"] == 100
    assert set(datasets(to_arviz(chains(host), var_names=[]))) == {"sample_stats", "observed_data", "constant_data"}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"var_names": ["w", "v"]}, r"var_names=\['w', 'v'\] names \['v'\], and the sites are .*'w'"),
        ({"var_names": "~y"}, r"var_names=\['~y'\] names \['y'\]"),
        ({"dims": {"v": ["a"]}}, r"dims names \['v'\]"),
        ({"dims": {"w": ["a", "b"]}}, r"dims\['w'\]=\['a', 'b'\] has more names"),
        ({"dims": {"w": ["a"], "g": ["a"]}}, r"dimension 'a' of '.' has"),
        ({"coords": {"data": [1, 2]}}, r"coords\['data'\] has shape \(2,\), and the dimension has 11"),
        ({"rows": [1]}, r"rows=\[1\].*no effect without log_likelihood=True"),
        ({"batch_size": 2}, r"batch_size=2 have no effect"),
        ({"rows": [11], "log_likelihood": True}, r"rows of plate 'data' must be from 0 to 10, got \[11\]"),
        ({"rows": [-1], "log_likelihood": True}, r"rows of plate 'data' must be from 0 to 10"),
        ({"rows": [], "log_likelihood": True}, r"rows of plate 'data' must be a list of one or more"),
        ({"rows": [True] * N, "log_likelihood": True}, r"rows of plate 'data' must be a list of one or more"),
        ({"rows": {"dat": [1]}, "log_likelihood": True}, r"rows names 'dat', but the model's plates are"),
        ({"batch_size": 12, "log_likelihood": True}, r"batch_size=12 is larger than plate 'data' of 11"),
        ({"batch_size": 0, "log_likelihood": True}, r"batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": {"groups": 1}, "log_likelihood": True}, r"the subsampled plates of this run are \['data'\]"),
    ],
)
def test_bad_arguments(host, arguments, message):
    with pytest.raises(ValueError, match=message):
        to_arviz(chains(host), **arguments)


@pytest.mark.parametrize("host", HOSTS)
def test_what_is_no_mcmc(host):
    mcmc = chains(host)
    kernel = mcmc.sampler if host == "numpyro" else mcmc.kernel
    for wrong in (kernel, {"w": np.zeros((2, 3))}, None):
        with pytest.raises(TypeError, match=r"source must be a .*MCMC"):
            to_arviz(wrong)
    subclass = type(type(mcmc).__name__, (type(mcmc),), {"__module__": "elsewhere"})
    mine = subclass.__new__(subclass)
    mine.__dict__.update(mcmc.__dict__)
    assert "w" in to_arviz(mine)["posterior"]


@pytest.mark.parametrize("host", HOSTS)
def test_log_likelihood_belongs_to_its_draw_and_row(host):
    groups = datasets(tree_of(host))
    mean = np.einsum("nk,cdk->cdn", X, groups["posterior"]["w"])
    expected = -0.5 * (X.sum(1) - mean) ** 2 - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(groups["log_likelihood"]["y"], expected, rtol=1e-4, atol=1e-5)


def test_settings_that_are_no_numbers():
    from bnn_ppl.export import _attributes

    def cosine(step):
        return step

    settings = {"step_size": cosine, "mass": {"w": 2.0}, "batch_size": None, "friction": 1.5, "noise": "normal"}
    expected = {"step_size": '"cosine"', "mass": '{"w": 2.0}', "friction": 1.5, "noise": "normal"}
    assert _attributes(settings) == expected


MEMORY = """
    import resource, sys
    import numpy as np
    import bnn_ppl, arviz
    ROWS, DRAWS, WEIGHTS = 200, 25, 40_000   # together 800 MB in single precision

    def model(x, y):
        w = ppl.sample("w", dist.Normal(zero, one).expand([WEIGHTS]).to_event(1))
        with ppl.plate("data", ROWS, subsample_size=25) as i:
            ppl.sample("y", dist.Normal((x[i, None] * w).sum(-1), one), obs=y[i])

    mcmc = run(model)
    bnn_ppl.to_arviz(mcmc)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tree = bnn_ppl.to_arviz(mcmc, log_likelihood=True, posterior_predictive=True)
    assert tree["log_likelihood"]["y"].shape == tree["posterior_predictive"]["y"].shape == (1, DRAWS, ROWS)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
RUNS = {
    "numpyro": """
    import jax, numpyro as ppl, numpyro.distributions as dist
    from numpyro.infer import MCMC
    from bnn_ppl.numpyro import SGLD
    zero, one = 0.0, 1.0

    def run(model):
        mcmc = MCMC(SGLD(model, step_size=1e-6), num_warmup=0, num_samples=DRAWS, progress_bar=False)
        mcmc.run(jax.random.key(0), jax.numpy.ones(ROWS), jax.numpy.ones(ROWS))
        return mcmc
    """,
    "pyro": """
    import torch, pyro as ppl, pyro.distributions as dist
    from pyro.infer import MCMC
    from bnn_ppl.pyro import SGLD
    zero, one = torch.tensor(0.0), torch.tensor(1.0)

    def run(model):
        mcmc = MCMC(SGLD(model, step_size=1e-6), DRAWS, 0, disable_progbar=True)
        mcmc.run(torch.ones(ROWS), torch.ones(ROWS))
        return mcmc
    """,
}


@pytest.mark.parametrize("host", HOSTS)
def test_memory_is_bounded(host, tmp_path):
    code = textwrap.dedent(RUNS[host]) + textwrap.dedent(MEMORY)
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    # All rows of one draw take 32 MB, all draws of one chunk 100 MB, one draw of one chunk 4 MB.
    assert float(ran.stdout) < 60


def test_arviz_of_both_generations(monkeypatch):
    from bnn_ppl.export import _for_arviz

    tree = xr.DataTree.from_dict({"posterior": xr.Dataset({"w": (("chain", "draw"), np.zeros((1, 2)))})})
    monkeypatch.setitem(sys.modules, "arviz", types.SimpleNamespace(convert_to_datatree=None))
    assert _for_arviz(tree) is tree
    made = types.SimpleNamespace(from_datatree=lambda tree: ("made from", tree))
    monkeypatch.setitem(sys.modules, "arviz", types.SimpleNamespace(InferenceData=made))
    assert _for_arviz(tree) == ("made from", tree)
