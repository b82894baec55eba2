"""to_arviz on NumPyro's MCMC, and ArviZ's own reader on our kernels."""

from functools import cache

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, log_likelihood

from bnn_ppl import to_arviz
from bnn_ppl.numpyro import SGHMC, SGLD, full_data

RNG = np.random.default_rng(0)
N, B = 23, 5
X = RNG.normal(size=(N, 3)).astype(np.float32)
Y = (X.sum(1) + RNG.normal(size=N)).astype(np.float32)


def regression(x, y, subsample_size=B):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([3]).to_event(1))
    with numpyro.plate("groups", 2):
        g = numpyro.sample("g", dist.Normal(0, 1))
        numpyro.deterministic("doubled", 2 * g)
    noise = numpyro.sample("noise", dist.HalfNormal(1))
    with numpyro.plate("data", x.shape[0], subsample_size=subsample_size):
        x, y = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
        mean = numpyro.deterministic("mean", x @ w + g[0])
        numpyro.sample("y", dist.Normal(mean, noise), obs=y)


def run(kernel, *args, draws=40, warmup=10, chains=2, method="vectorized", fields=(), init=None, **kwargs):
    mcmc = MCMC(
        kernel, num_warmup=warmup, num_samples=draws, num_chains=chains, chain_method=method, progress_bar=False
    )
    mcmc.run(jax.random.key(1), *args, extra_fields=fields, init_params=init, **kwargs)
    return mcmc


def sghmc(model, **settings):
    return SGHMC(model, **{"step_size": 0.02, "friction": 1.0} | settings)


@cache
def chains(size=B, method="vectorized"):
    """Short chains, compiled once."""
    return run(sghmc(regression), X, Y, method=method, subsample_size=size)


@pytest.fixture(scope="module")
def minibatch():
    return chains()


@pytest.fixture(scope="module")
def minibatch_tree(minibatch):
    return to_arviz(minibatch, log_likelihood=True, posterior_predictive=True)


def host_log_likelihood(mcmc, model, *args, **kwargs):
    draws = mcmc.get_samples(group_by_chain=True)
    return log_likelihood(full_data(model), draws, *args, batch_ndims=2, **kwargs)


@pytest.mark.parametrize("method", ["vectorized", "sequential"])
@pytest.mark.parametrize("size", [B, None])
def test_groups_shapes_and_arviz_reads_the_same(method, size):
    mcmc = chains(size, method)
    tree, theirs = to_arviz(mcmc), az.from_numpyro(mcmc)
    draws = mcmc.get_samples(group_by_chain=True)
    # In a minibatch model, `mean` has one row per row of the batch, which differ from draw to draw.
    assert set(tree["posterior"].data_vars) == {"w", "g", "noise", "doubled"} | ({"mean"} if size is None else set())
    for name, value in tree["posterior"].data_vars.items():
        np.testing.assert_array_equal(value, draws[name])
        np.testing.assert_array_equal(value, theirs["posterior"][name])
    lp = "lp" if size is None else "lp_minibatch"
    assert set(tree["sample_stats"].data_vars) == set(SGHMC.statistic_fields) - {"lp_minibatch"} | {lp}
    for name, value in tree["sample_stats"].data_vars.items():
        assert value.dims == ("chain", "draw", *(["site"] if str(name).startswith("site_") else []))
        assert value.shape[:2] == (2, 40)
        np.testing.assert_array_equal(value, theirs["sample_stats"]["lp_minibatch" if name == lp else name])
    assert tree["sample_stats"]["site"].values.tolist() == sorted(tree["sample_stats"]["site"].values.tolist())
    assert set(tree["sample_stats"]["site"].values) <= set(tree["posterior"].data_vars)
    assert tree["sample_stats"]["diverging"].dtype == bool
    np.testing.assert_array_equal(tree["observed_data"]["y"], Y)
    np.testing.assert_array_equal(theirs["observed_data"]["y"], Y)
    assert set(tree["constant_data"].data_vars) == {"x"}
    np.testing.assert_array_equal(tree["constant_data"]["x"], X)


def test_dims_and_coords(minibatch, minibatch_tree):
    tree = minibatch_tree
    posterior, y = tree["posterior"], tree["observed_data"]["y"]
    assert posterior["w"].dims == ("chain", "draw", "w_dim_0")
    assert posterior["g"].dims == posterior["doubled"].dims == ("chain", "draw", "groups")
    assert y.dims == ("data",)
    np.testing.assert_array_equal(y["data"], np.arange(N))
    assert tree["constant_data"]["x"].dims == ("data", "x_dim_1")
    for group in ("log_likelihood", "posterior_predictive"):
        assert tree[group]["y"].dims == ("chain", "draw", "data")
    names = {"w": ["input"], "y": ["row"], "x": ["row", "input"]}
    labels = {"input": ["a", "b", "c"], "row": np.arange(N) + 100}
    tree = to_arviz(minibatch, dims=names, coords=labels, log_likelihood=True, rows=[4, 2])
    assert tree["posterior"]["w"].sel(input="b").shape == (2, 40)
    assert tree["constant_data"]["x"].dims == ("row", "input")
    np.testing.assert_array_equal(tree["log_likelihood"]["row"], [104, 102])
    theirs = minibatch_tree["log_likelihood"]["y"][..., [4, 2]]
    np.testing.assert_allclose(tree["log_likelihood"]["y"], theirs, rtol=1e-6)  # another chunk rounds otherwise


def test_attributes(minibatch_tree):
    attributes = minibatch_tree["posterior"].attrs
    assert attributes["kernel"] == "SGHMC"
    assert attributes["step_size"] == 0.02
    assert attributes["inference_library_version"] == numpyro.__version__


def test_nothing_is_copied(minibatch):
    draws = minibatch.get_samples(group_by_chain=True)
    tree = to_arviz(minibatch)
    assert np.shares_memory(tree["posterior"]["w"].values, np.asarray(draws["w"]))
    assert np.shares_memory(tree["constant_data"]["x"].values, X)


@pytest.mark.parametrize("size", [None, 1, 7, N])
def test_log_likelihood_equals_the_hosts(minibatch, size):
    expected = host_log_likelihood(minibatch, regression, X, Y)["y"]
    tree = to_arviz(minibatch, log_likelihood=True, batch_size=size)
    assert expected.shape == (2, 40, N)
    np.testing.assert_allclose(tree["log_likelihood"]["y"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [[22], [3, 22, 0, 7, 7, 1, 20], np.arange(N)[::-1]])
@pytest.mark.parametrize("size", [B, None])
def test_chosen_rows(rows, size):
    mcmc = chains(size)
    expected = host_log_likelihood(mcmc, regression, X, Y, subsample_size=size)["y"][:, :, np.asarray(rows)]
    tree = to_arviz(mcmc, log_likelihood=True, posterior_predictive=True, rows={"data": rows})
    np.testing.assert_allclose(tree["log_likelihood"]["y"], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(tree["log_likelihood"]["data"], rows)
    assert tree["posterior_predictive"]["y"].shape == expected.shape
    assert tree["observed_data"]["y"].shape == (N,)


def two_plates(a, b, c, sizes=(3, 2)):
    """One site in both plates, one in each, one with an event, one in none, and a factor."""
    w = numpyro.sample("w", dist.Normal(0, 1))
    rows = numpyro.plate("rows", 7, subsample_size=sizes[0], dim=-2)
    columns = numpyro.plate("columns", 5, subsample_size=sizes[1], dim=-1)
    with rows as i, columns as j:
        numpyro.sample("a", dist.Normal(w, 1), obs=a[i][:, j])
    with rows:
        numpyro.sample("b", dist.MultivariateNormal(w * jnp.ones(4), jnp.eye(4)), obs=numpyro.subsample(b, event_dim=1))
    with columns as j:
        numpyro.sample("c", dist.Normal(w, 2), obs=c[j])
    numpyro.sample("t", dist.Normal(w, 1), obs=0.5)
    numpyro.factor("f", -(w**2))


@pytest.mark.parametrize("sizes", [(3, 2), (None, 4)])
def test_two_plates(sizes):
    a, b, c = (jnp.array(RNG.normal(size=s), jnp.float32) for s in [(7, 5), (7, 1, 4), (5,)])
    mcmc = run(sghmc(two_plates, step_size=0.01), a, b, c, draws=5, sizes=sizes)
    tree = to_arviz(mcmc, log_likelihood=True, posterior_predictive=True)
    expected = host_log_likelihood(mcmc, two_plates, a, b, c, sizes=sizes)
    assert set(tree["log_likelihood"].data_vars) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(tree["log_likelihood"][name], value, rtol=1e-5, atol=1e-6)
    for name, value in {"a": a, "b": b, "c": c, "t": 0.5}.items():
        np.testing.assert_array_equal(tree["observed_data"][name], np.float32(value))
    assert set(tree["posterior_predictive"].data_vars) == set(tree["observed_data"].data_vars) == {"a", "b", "c", "t"}
    predictive = tree["posterior_predictive"]
    assert predictive["a"].dims == ("chain", "draw", "rows", "columns")
    assert predictive["b"].dims == ("chain", "draw", "rows", "b_dim_1", "b_dim_2")
    assert predictive["b"].shape == (2, 5, 7, 1, 4)
    assert predictive["c"].shape == (2, 5, 5)
    # Every value has noise of its own, across chunks too.
    values = np.concatenate([predictive[n].values.ravel() for n in "abc"])
    assert len(np.unique(values)) > 10 * (35 + 28 + 5) - 5  # but for the odd tie of rounded numbers


def ancestral(x, shift, first, second):
    w = numpyro.sample("w", dist.Normal(0, 1))
    shift = numpyro.sample("shift", dist.Normal(0, 1), obs=shift)
    with numpyro.plate("data", N, subsample_size=B) as i:
        first = numpyro.sample("first", dist.Normal(w * x[i] + shift, 0.5), obs=first[i])
        numpyro.sample("second", dist.Normal(first, 0.01), obs=second[i])


def test_posterior_predictive_is_right_in_distribution():
    x = X[:, 0]
    mcmc = run(sghmc(ancestral), x, 3.0, x + 3, x + 3, draws=1000)
    predictive = to_arviz(mcmc, posterior_predictive=True)["posterior_predictive"]
    shift, first, second = (predictive[name].values for name in ("shift", "first", "second"))
    w = np.asarray(mcmc.get_samples(group_by_chain=True)["w"])
    z_shift = shift.ravel()
    z_first = ((first - w[..., None] * x - shift[..., None]) / 0.5).reshape(-1, N)
    z_second = ((second - first) / 0.01).reshape(-1, N)
    for z in (z_shift, z_first, z_second):  # each row's mean and variance, z-scores below 4.5
        n = len(z)
        assert np.abs(z.mean(0) * n**0.5).max() < 4.5
        assert np.abs((z.var(0) - 1) * (n / 2) ** 0.5).max() < 4.5
    rows = np.corrcoef(z_first.T) - np.eye(N)
    assert np.abs(rows).max() * len(z_first) ** 0.5 < 5
    draws = np.corrcoef(z_first.reshape(2, 1000, N)[0].ravel(), z_first.reshape(2, 1000, N)[1].ravel())[0, 1]
    assert abs(draws) * (1000 * N) ** 0.5 < 4.5


def test_seed(minibatch, minibatch_tree):
    again, other = (to_arviz(minibatch, posterior_predictive=True, seed=seed) for seed in (0, 1))
    first = minibatch_tree["posterior_predictive"]["y"]
    np.testing.assert_array_equal(again["posterior_predictive"]["y"], first)
    assert not (other["posterior_predictive"]["y"].values == first.values).any()


def test_a_model_that_knows_its_batch_size():
    def model(x, y):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([3]).to_event(1))
        with numpyro.plate("data", N, subsample_size=B) as i:
            numpyro.sample("y", dist.Normal(x[i].reshape(B, 3) @ w, 1), obs=y[i])

    mcmc = run(sghmc(model), X, Y, draws=4)
    expected = host_log_likelihood(mcmc, lambda x, y: regression_of(x, y, N), X, Y)["y"]
    np.testing.assert_allclose(to_arviz(mcmc, log_likelihood=True)["log_likelihood"]["y"], expected, rtol=1e-5)


def regression_of(x, y, size):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([3]).to_event(1))
    with numpyro.plate("data", size):
        numpyro.sample("y", dist.Normal(x @ w, 1), obs=y)


def test_a_model_that_looks_at_the_values_of_its_arguments():
    def model(x, y):
        scale = 1.0 + (float(np.asarray(y)[0]) > 1e9)
        w = numpyro.sample("w", dist.Normal(0, scale).expand([3]).to_event(1))
        with numpyro.plate("data", N, subsample_size=B) as i:
            numpyro.sample("y", dist.Normal(x[i] @ w, 1), obs=y[i])

    mcmc = run(sghmc(model), jnp.array(X), jnp.array(Y), draws=4)
    expected = host_log_likelihood(mcmc, lambda x, y: regression_of(x, y, N), X, Y)["y"]
    np.testing.assert_allclose(to_arviz(mcmc, log_likelihood=True)["log_likelihood"]["y"], expected, rtol=1e-5)


def test_batch_size_of_the_kernel():
    mcmc = run(sghmc(regression, batch_size=4), X, Y, draws=4, subsample_size=None)
    tree = to_arviz(mcmc, log_likelihood=True, batch_size={"data": 6})
    expected = host_log_likelihood(mcmc, regression, X, Y, subsample_size=None)["y"]
    np.testing.assert_allclose(tree["log_likelihood"]["y"], expected, rtol=1e-6, atol=1e-6)
    assert "lp_minibatch" in tree["sample_stats"]
    np.testing.assert_array_equal(tree["observed_data"]["y"], Y)
    assert tree["posterior"].attrs["batch_size"] == 4


def test_the_hosts_own_kernels():
    fields = ("potential_energy", "num_steps")
    mcmc = run(NUTS(regression, max_tree_depth=3), X, Y, draws=8, fields=fields, subsample_size=None)
    tree, theirs = to_arviz(mcmc, log_likelihood=True), az.from_numpyro(mcmc)
    for name in ("lp", "diverging", "n_steps"):
        np.testing.assert_array_equal(tree["sample_stats"][name], theirs["sample_stats"][name])
    np.testing.assert_array_equal(tree["posterior"]["mean"], mcmc.get_samples(group_by_chain=True)["mean"])
    assert tree["posterior"]["mean"].dims == ("chain", "draw", "data")
    expected = host_log_likelihood(mcmc, regression, X, Y, subsample_size=None)["y"]
    np.testing.assert_allclose(tree["log_likelihood"]["y"], expected, rtol=1e-6, atol=1e-6)
    assert tree["posterior"].attrs["kernel"] == "NUTS"


def test_param_sites_keep_their_values():
    def model(y):
        slope = numpyro.param("slope", lambda key: jax.random.normal(key))
        w = numpyro.sample("w", dist.Normal(0, 1))
        with numpyro.plate("data", N, subsample_size=B):
            numpyro.sample("y", dist.Normal(w + slope, 1), obs=numpyro.subsample(y, event_dim=0))

    kernel = sghmc(model)
    with pytest.warns(UserWarning, match="param sites"):
        mcmc = run(kernel, Y, draws=4)
    location = np.asarray(mcmc.get_samples(group_by_chain=True)["w"]) + float(kernel._held["slope"])
    expected = -0.5 * (Y - location[..., None]) ** 2 - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(
        to_arviz(mcmc, log_likelihood=True)["log_likelihood"]["y"], expected, rtol=1e-4, atol=1e-5
    )


def test_potential_fn():
    def energy(z):
        return sum(0.5 * jnp.sum(leaf**2) for leaf in jax.tree.leaves(z))

    kernel = SGLD(potential_fn=energy, step_size=0.1)
    tree = to_arviz(run(kernel, init={"a": jnp.zeros((2, 3)), "b": jnp.zeros(2)}))
    assert {n: v.shape for n, v in tree["posterior"].data_vars.items()} == {"a": (2, 40, 3), "b": (2, 40)}
    assert "lp" in tree["sample_stats"]
    assert set(group_names(tree)) == {"posterior", "sample_stats"}
    for init, names in [((jnp.zeros((2, 3)), [jnp.zeros(2)]), ["Param:0", "Param:1"]), (jnp.zeros(2), ["Param:0"])]:
        mcmc = run(SGLD(potential_fn=energy, step_size=0.1), init=init)
        tree = to_arviz(mcmc)
        assert list(tree["posterior"].data_vars) == names
        assert set(az.from_numpyro(mcmc)["posterior"].data_vars) == set(names)
    with pytest.raises(ValueError, match=r"log_likelihood=True.*potential_fn"):
        to_arviz(mcmc, log_likelihood=True)


def group_names(tree):
    return [name.strip("/") for name in (tree.groups() if callable(tree.groups) else tree.groups) if name != "/"]


def test_diverging_draws_are_told():
    mcmc = run(sghmc(regression, step_size=1e6), X, Y, draws=5)
    with pytest.warns(UserWarning, match=r"10 of 10 draws diverged \(\[5, 5\] by chain\).*lower step_size"):
        tree = to_arviz(mcmc)
    assert tree["sample_stats"]["diverging"].all()


def test_draws_left_out_of_the_run():
    mcmc = MCMC(sghmc(regression), num_warmup=5, num_samples=5, progress_bar=False)
    with pytest.raises(ValueError, match=r"call mcmc\.run"):
        to_arviz(mcmc)
    mcmc.warmup(jax.random.key(0), X, Y)
    with pytest.raises(ValueError, match=r"call mcmc\.run"):
        to_arviz(mcmc)
    mcmc.run(jax.random.key(0), X, Y)
    mcmc.post_warmup_state = mcmc.last_state
    assert "w" in to_arviz(mcmc)["posterior"]
    mcmc._states["z"].pop("w")
    assert "w" not in to_arviz(mcmc)["posterior"]
    with pytest.raises(ValueError, match=r"log_likelihood=True needs .*\['w'\]"):
        to_arviz(mcmc, log_likelihood=True)


def test_argument_named_as_a_plate():
    def model(data, y, *more, **named):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([3]).to_event(1))
        with numpyro.plate("data", N, subsample_size=B) as i:
            numpyro.sample("y", dist.Normal(data[i] @ w, 1), obs=y[i])

    constants = to_arviz(run(sghmc(model), X, Y, np.ones(2), draws=3, offset=np.zeros(4)))["constant_data"]
    assert {n: v.shape for n, v in constants.data_vars.items()} == {"data_": (N, 3), "more_0": (2,), "offset": (4,)}
    assert constants["data_"].dims == ("data", "data_dim_1")


def test_slashes_in_names_become_dots():
    def model(y):
        with numpyro.handlers.scope(prefix="net"):
            w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
            v = numpyro.sample("v", dist.Normal(0, 1))
        with numpyro.plate("data", N, subsample_size=B):
            numpyro.sample("y", dist.Normal(w[0] + v, 1), obs=numpyro.subsample(y, event_dim=0))

    mcmc = run(sghmc(model), Y, draws=3)
    tree = to_arviz(mcmc, log_likelihood=True)
    assert tree["posterior"]["net.w"].dims == ("chain", "draw", "net.w_dim_0")
    assert tree["log_likelihood"]["y"].shape == (2, 3, N)
    for names in (["net/w"], ["net.w"], ["~net/v"], "~net.v"):
        tree = to_arviz(mcmc, var_names=names, dims={"net/w": ["input"]})
        assert {n: v.dims for n, v in tree["posterior"].data_vars.items()} == {"net.w": ("chain", "draw", "input")}


def test_arviz_reads_models_that_index_numpy_arrays():
    def model(x, y):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([3]).to_event(1))
        with numpyro.plate("data", N, subsample_size=B) as i:
            numpyro.sample("y", dist.Normal(x[i] @ w, 1), obs=y[i])

    mcmc = run(sghmc(model), X, Y, draws=3)
    theirs = az.from_numpyro(mcmc, log_likelihood=True)
    ours = to_arviz(mcmc, log_likelihood=True)
    np.testing.assert_allclose(ours["log_likelihood"]["y"], theirs["log_likelihood"]["y"], rtol=1e-5, atol=1e-6)
