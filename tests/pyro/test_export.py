"""to_arviz on Pyro's MCMC."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, MCMC, NUTS

from bnn_ppl import to_arviz
from bnn_ppl.pyro import SGHMC, SGLD, full_data

RNG = np.random.default_rng(0)
N, B = 23, 5
X = torch.tensor(RNG.normal(size=(N, 3)), dtype=torch.float32)
Y = X.sum(1) + torch.tensor(RNG.normal(size=N), dtype=torch.float32)


def regression(x, y, subsample_size=B):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("groups", 2):
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        pyro.deterministic("doubled", 2 * g)
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x), subsample_size=subsample_size):
        x, y = pyro.subsample(x, event_dim=1), pyro.subsample(y, event_dim=0)
        mean = pyro.deterministic("mean", x @ w + g[0])
        pyro.sample("y", dist.Normal(mean, noise), obs=y)


def run(kernel, *args, draws=20, warmup=5, chains=2, init=None, **kwargs):
    pyro.set_rng_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the chain was not finite")
        mcmc = MCMC(kernel, draws, warmup, initial_params=init, num_chains=chains, disable_progbar=True)
        mcmc.run(*args, **kwargs)
    return mcmc


def sghmc(model, **settings):
    return SGHMC(model, **{"step_size": 0.02, "friction": 1.0, "steps_per_draw": 3} | settings)


@pytest.fixture(scope="module")
def minibatch():
    return run(sghmc(regression), X, Y)


@pytest.fixture(scope="module")
def minibatch_tree(minibatch):
    return to_arviz(minibatch, log_likelihood=True, posterior_predictive=True)


def host_log_likelihood(mcmc, model, *args, **kwargs):
    """Log density of each observed site under each draw, by the host on the full data."""
    draws, found = mcmc.get_samples(group_by_chain=True), {}
    for chain, draw in np.ndindex(mcmc.num_chains, mcmc.num_samples):
        values = {name: value[chain, draw] for name, value in draws.items()}
        trace = pyro.poutine.trace(pyro.poutine.condition(full_data(model), values)).get_trace(*args, **kwargs)
        trace.compute_log_prob()
        for name in trace.observation_nodes:
            site = trace.nodes[name]
            if name not in draws and not site["infer"].get("_deterministic"):
                found.setdefault(name, []).append(site["fn"].log_prob(site["value"]).numpy())
    return {n: np.stack(v).reshape(mcmc.num_chains, mcmc.num_samples, *v[0].shape) for n, v in found.items()}


@pytest.mark.parametrize("size", [B, None])
def test_groups_and_shapes(size):
    mcmc = run(sghmc(regression), X, Y, draws=6, subsample_size=size)
    tree, draws = to_arviz(mcmc), mcmc.get_samples(group_by_chain=True)
    computed = {"doubled"} | ({"mean"} if size is None else set())
    assert set(tree["posterior"].data_vars) == {"w", "g", "noise"} | computed
    for name, value in draws.items():
        np.testing.assert_array_equal(tree["posterior"][name], value)
    np.testing.assert_array_equal(tree["posterior"]["doubled"], 2 * draws["g"])
    if size is None:
        mean = np.einsum("nk,cdk->cdn", X, draws["w"]) + draws["g"][..., :1].numpy()
        np.testing.assert_allclose(tree["posterior"]["mean"], mean, rtol=1e-5, atol=1e-6)
    lp = "lp" if size is None else "lp_minibatch"
    assert set(tree["sample_stats"].data_vars) == set(SGHMC.statistic_fields) - {"lp_minibatch"} | {lp}
    for name, value in tree["sample_stats"].data_vars.items():
        recorded = [mcmc._diagnostics[chain]["lp_minibatch" if name == lp else name] for chain in range(2)]
        assert value.dims == ("chain", "draw", *(["site"] if str(name).startswith("site_") else []))
        assert value.shape[:2] == (2, 6)
        np.testing.assert_array_equal(value, torch.stack(recorded))
    assert set(tree["sample_stats"]["site"].values) <= set(tree["posterior"].data_vars)
    assert tree["sample_stats"]["diverging"].dtype == bool
    np.testing.assert_array_equal(tree["observed_data"]["y"], Y)
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
    names = {"w": ["input"], "y": ["row"], "x": ["row", "input"]}
    labels = {"input": ["a", "b", "c"], "row": np.arange(N) + 100}
    tree = to_arviz(minibatch, dims=names, coords=labels, log_likelihood=True, rows=[4, 2])
    assert tree["posterior"]["w"].sel(input="b").shape == (2, 20)
    assert tree["constant_data"]["x"].dims == ("row", "input")
    np.testing.assert_array_equal(tree["log_likelihood"]["row"], [104, 102])
    theirs = minibatch_tree["log_likelihood"]["y"][..., [4, 2]]
    np.testing.assert_allclose(tree["log_likelihood"]["y"], theirs, rtol=1e-6)  # another chunk rounds otherwise


def test_attributes_and_nothing_copied(minibatch):
    tree = to_arviz(minibatch, var_names="w")
    assert tree["posterior"].attrs["kernel"] == "SGHMC"
    assert tree["posterior"].attrs["step_size"] == 0.02
    assert tree["posterior"].attrs["inference_library_version"] == pyro.__version__
    assert np.shares_memory(tree["posterior"]["w"].values, minibatch.get_samples(group_by_chain=True)["w"].numpy())
    assert np.shares_memory(tree["constant_data"]["x"].values, X.numpy())


@pytest.mark.parametrize("size", [None, 1, 7, N])
def test_log_likelihood_equals_the_hosts(minibatch, size):
    expected = host_log_likelihood(minibatch, regression, X, Y)["y"]
    tree = to_arviz(minibatch, log_likelihood=True, batch_size=size)
    assert expected.shape == (2, 20, N)
    np.testing.assert_allclose(tree["log_likelihood"]["y"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [[22], [3, 22, 0, 7, 7, 1, 20], np.arange(N)[::-1]])
@pytest.mark.parametrize("size", [B, None])
def test_chosen_rows(rows, size):
    mcmc = run(sghmc(regression), X, Y, draws=4, subsample_size=size)
    expected = host_log_likelihood(mcmc, regression, X, Y, subsample_size=size)["y"][:, :, np.asarray(rows)]
    tree = to_arviz(mcmc, log_likelihood=True, posterior_predictive=True, rows={"data": rows})
    np.testing.assert_allclose(tree["log_likelihood"]["y"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(tree["log_likelihood"]["data"], rows)
    assert tree["posterior_predictive"]["y"].shape == expected.shape
    assert tree["observed_data"]["y"].shape == (N,)


def two_plates(a, b, c, sizes=(3, 2)):
    """One site in both plates, one in each, one with an event, one in none, and a factor."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    rows = pyro.plate("rows", 7, subsample_size=sizes[0], dim=-2)
    columns = pyro.plate("columns", 5, subsample_size=sizes[1], dim=-1)
    with rows as i, columns as j:
        pyro.sample("a", dist.Normal(w, 1.0), obs=a[i][:, j])
    with rows:
        event = dist.MultivariateNormal(w * torch.ones(4), torch.eye(4))
        pyro.sample("b", event, obs=pyro.subsample(b, event_dim=1))
    with columns as j:
        pyro.sample("c", dist.Normal(w, 2.0), obs=c[j])
    pyro.sample("t", dist.Normal(w, 1.0), obs=torch.tensor(0.5))
    pyro.factor("f", -(w**2))


@pytest.mark.parametrize("sizes", [(3, 2), (3, None), (None, 4)])
def test_two_plates(sizes):
    a, b, c = (torch.tensor(RNG.normal(size=s), dtype=torch.float32) for s in [(7, 5), (7, 1, 4), (5,)])
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
    tree = to_arviz(mcmc, log_likelihood=True, rows={"rows": [6, 0]})
    np.testing.assert_allclose(tree["log_likelihood"]["a"], expected["a"][:, :, [6, 0]], rtol=1e-5, atol=1e-6)


def ancestral(x, shift, first, second):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0), obs=shift)
    with pyro.plate("data", N, subsample_size=B) as i:
        first = pyro.sample("first", dist.Normal(w * x[i] + shift, 0.5), obs=first[i])
        pyro.sample("second", dist.Normal(first, 0.01), obs=second[i])


def test_posterior_predictive_is_right_in_distribution():
    x = X[:, 0]
    mcmc = run(sghmc(ancestral, steps_per_draw=1), x, torch.tensor(3.0), x + 3, x + 3, draws=200)
    predictive = to_arviz(mcmc, posterior_predictive=True, batch_size=12)["posterior_predictive"]
    shift, first, second = (predictive[name].values for name in ("shift", "first", "second"))
    w = mcmc.get_samples(group_by_chain=True)["w"].numpy()
    z_shift = shift.ravel()
    z_first = ((first - w[..., None] * x.numpy() - shift[..., None]) / 0.5).reshape(-1, N)
    z_second = ((second - first) / 0.01).reshape(-1, N)
    for z in (z_shift, z_first, z_second):  # each row's mean and variance, z-scores below 4.5
        n = len(z)
        assert np.abs(z.mean(0) * n**0.5).max() < 4.5
        assert np.abs((z.var(0) - 1) * (n / 2) ** 0.5).max() < 4.5
    rows = np.corrcoef(z_first.T) - np.eye(N)
    assert np.abs(rows).max() * len(z_first) ** 0.5 < 5
    chains = z_first.reshape(2, -1)
    assert abs(np.corrcoef(*chains)[0, 1]) * chains.shape[1] ** 0.5 < 4.5


def test_seed_and_the_global_random_state(minibatch, minibatch_tree):
    state = torch.get_rng_state()
    again, other = (to_arviz(minibatch, posterior_predictive=True, seed=seed) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    first = minibatch_tree["posterior_predictive"]["y"]
    np.testing.assert_array_equal(again["posterior_predictive"]["y"], first)
    assert not (other["posterior_predictive"]["y"].values == first.values).any()


def test_a_model_that_knows_its_batch_size():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", N, subsample_size=B) as i:
            pyro.sample("y", dist.Normal(x[i].reshape(B, 3) @ w, 1.0), obs=y[i])

    mcmc = run(sghmc(model), X, Y, draws=4)
    mean = np.einsum("nk,cdk->cdn", X, mcmc.get_samples(group_by_chain=True)["w"])
    expected = -0.5 * (Y.numpy() - mean) ** 2 - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(to_arviz(mcmc, log_likelihood=True)["log_likelihood"]["y"], expected, rtol=1e-4)


def test_batch_size_of_the_kernel():
    mcmc = run(sghmc(regression, batch_size=4), X, Y, draws=4, subsample_size=None)
    tree = to_arviz(mcmc, log_likelihood=True, batch_size={"data": 6})
    expected = host_log_likelihood(mcmc, regression, X, Y, subsample_size=None)["y"]
    np.testing.assert_allclose(tree["log_likelihood"]["y"], expected, rtol=1e-5, atol=1e-6)
    assert "lp_minibatch" in tree["sample_stats"]
    np.testing.assert_array_equal(tree["observed_data"]["y"], Y)
    assert tree["posterior"].attrs["batch_size"] == 4


@pytest.mark.parametrize("kernel", [NUTS(regression, max_tree_depth=3), HMC(regression, num_steps=2)])
def test_the_hosts_own_kernels(kernel):
    mcmc = run(kernel, X, Y, draws=6, subsample_size=None)
    for diagnostics in mcmc._diagnostics:
        diagnostics["divergences"] = []
    mcmc._diagnostics[1]["divergences"] = [2]
    with pytest.warns(UserWarning, match=r"1 of 12 draws diverged \(\[0, 1\] by chain\).*target_accept_prob"):
        tree = to_arviz(mcmc, log_likelihood=True)
    assert np.argwhere(tree["sample_stats"]["diverging"].values).tolist() == [[1, 2]]
    assert tree["posterior"]["mean"].dims == ("chain", "draw", "data")
    expected = host_log_likelihood(mcmc, regression, X, Y, subsample_size=None)["y"]
    np.testing.assert_allclose(tree["log_likelihood"]["y"], expected, rtol=1e-5, atol=1e-6)
    assert tree["posterior"].attrs["kernel"] == type(kernel).__name__


def test_chains_in_processes(monkeypatch):
    monkeypatch.setattr("pyro.infer.mcmc.api.mp.cpu_count", lambda: 8)
    mcmc = run(sghmc(regression), X, Y, draws=4)
    tree = to_arviz(mcmc, log_likelihood=True)
    assert tree["sample_stats"]["lp_minibatch"].shape == (2, 4)
    expected = host_log_likelihood(mcmc, regression, X, Y)["y"]
    np.testing.assert_allclose(tree["log_likelihood"]["y"], expected, rtol=1e-5, atol=1e-6)


def test_param_sites_keep_their_values():
    def model(y):
        slope = pyro.param("slope", lambda: torch.randn(()))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample_size=B):
            pyro.sample("y", dist.Normal(w + slope, 1.0), obs=pyro.subsample(y, event_dim=0))

    pyro.clear_param_store()
    with pytest.warns(UserWarning, match="param sites"):
        mcmc = run(sghmc(model), Y, draws=4, chains=1)
    location = mcmc.get_samples(group_by_chain=True)["w"] + pyro.param("slope").detach()
    pyro.get_param_store()["slope"] = torch.tensor(100.0)
    tree = to_arviz(mcmc, log_likelihood=True)
    expected = dist.Normal(location[..., None], 1.0).log_prob(Y)
    np.testing.assert_allclose(tree["log_likelihood"]["y"], expected, rtol=1e-5, atol=1e-5)
    assert pyro.param("slope").item() == 100
    pyro.clear_param_store()


def test_masked_rows_score_zero():
    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample_size=B) as i, pyro.poutine.mask(mask=i % 2 == 0):
            pyro.sample("y", dist.Normal(w, 1.0), obs=y[i])

    scores = to_arviz(run(sghmc(model), Y, draws=2), log_likelihood=True)["log_likelihood"]["y"].values
    assert (scores[..., 1::2] == 0).all()
    assert (scores[..., ::2] != 0).all()


def test_potential_fn():
    def energy(z):
        return sum(0.5 * (value**2).sum() for value in z.values())

    kernel = SGLD(potential_fn=energy, step_size=0.1)
    mcmc = run(kernel, init={"a": torch.zeros(2, 3), "b": torch.zeros(2)})
    tree = to_arviz(mcmc)
    assert {n: v.shape for n, v in tree["posterior"].data_vars.items()} == {"a": (2, 20, 3), "b": (2, 20)}
    assert "lp" in tree["sample_stats"]
    with pytest.raises(ValueError, match=r"log_likelihood=True.*potential_fn"):
        to_arviz(mcmc, log_likelihood=True)


def test_diverging_draws_are_told():
    mcmc = run(sghmc(regression, step_size=1e6), X, Y, draws=5)
    with pytest.warns(UserWarning, match=r"10 of 10 draws diverged \(\[5, 5\] by chain\).*lower step_size"):
        tree = to_arviz(mcmc)
    assert tree["sample_stats"]["diverging"].all()


def test_draws_left_out_of_the_run(minibatch):
    mcmc = MCMC(sghmc(regression), 4, 2, save_params=["g", "noise"], disable_progbar=True)
    with pytest.raises(ValueError, match=r"call mcmc\.run"):
        to_arviz(mcmc)
    mcmc.run(X, Y)
    assert set(to_arviz(mcmc, var_names=["~doubled"])["posterior"].data_vars) == {"g", "noise"}
    with pytest.raises(ValueError, match=r"log_likelihood=True.* draws .*\['w'\]"):
        to_arviz(mcmc, var_names="g", log_likelihood=True)


def test_module_as_model():
    class Model(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = pyro.nn.PyroModule[torch.nn.Linear](3, 1)
            self.linear.weight = pyro.nn.PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
            self.linear.bias = pyro.nn.PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

        def forward(self, x, y):
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", N):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    tree = to_arviz(run(sghmc(Model()), X, Y, draws=3), log_likelihood=True)
    draws = tree["posterior"]
    mean = np.einsum("nk,cdok->cdn", X, draws["linear.weight"]) + draws["linear.bias"].values
    expected = -0.5 * (Y.numpy() - mean) ** 2 - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(tree["log_likelihood"]["y"], expected, rtol=1e-4, atol=1e-5)
    assert set(tree["constant_data"].data_vars) == {"x"}
