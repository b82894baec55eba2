"""predict on both hosts: against loops over draws in NumPy, and each other; batches, exact inequalities and memory."""

import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats
from scipy.special import entr, logsumexp, softmax

from bnn_ppl import diagnostics, predictions
from tests.predicted import (
    CHAINS,
    CLASSES,
    DRAWS,
    LABELS,
    LINEAR,
    NUMPYRO,
    PLATES,
    PYRO,
    REGRESSION,
    VALUES,
    WEIGHTS,
    N,
    X,
    assert_equal,
    by_hand_classes,
    by_hand_regression,
    classifier,
    in_plate,
    normal,
    on,
    regression,
)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=[NUMPYRO, PYRO], ids=lambda host: host.name)
def host(request):
    return request.param


# ---- against loops


@pytest.mark.parametrize("kind", PLATES)
def test_classes_equal_a_loop_over_draws(host, kind):
    found = host.predict(
        WEIGHTS, *on(host, X, LABELS), model=classifier(host, kind), functions=True, row_batch_size=4, draw_batch_size=5
    )
    assert_equal(found, by_hand_classes())
    assert found["probabilities"].dims == ("row", "class")
    assert found["functions"].dims == ("chain", "draw", "row", "class")
    assert found["observed"].dtype == np.int64
    assert found.attrs == {"site": "y", "num_draws": CHAINS * DRAWS}


@pytest.mark.parametrize("kind", PLATES)
def test_values_equal_a_loop_over_draws(host, kind):
    model = regression(host, kind)
    found = host.predict(REGRESSION, *on(host, X, VALUES), model=model, functions=True, row_batch_size=5)
    assert_equal(found, by_hand_regression())
    assert found["mean"].dims == ("row",)
    assert found["noise_sd"].dims == ("chain", "draw", "row")


def test_both_hosts_agree():
    arguments = {"functions": True, "row_batch_size": 3}
    for draws, y, model in ((WEIGHTS, LABELS, classifier), (REGRESSION, VALUES, regression)):
        one, other = (h.predict(draws, *on(h, X, y), model=model(h), **arguments) for h in (NUMPYRO, PYRO))
        xr.testing.assert_allclose(one, other, rtol=1e-12)
        assert one.attrs == other.attrs
        assert list(one.data_vars) == list(other.data_vars)
        assert [v.dtype for v in one.values()] == [v.dtype for v in other.values()]


@pytest.mark.parametrize("row_batch_size", [1, 4, 10, N, None])
@pytest.mark.parametrize("draw_batch_size", [1, 5, CHAINS * DRAWS, 1000])
def test_batches_do_not_matter(host, row_batch_size, draw_batch_size):
    found = host.predict(
        REGRESSION,
        *on(host, X, VALUES),
        model=regression(host),
        functions=True,
        row_batch_size=row_batch_size,
        draw_batch_size=draw_batch_size,
    )
    assert_equal(found, by_hand_regression())


def test_without_observations(host):
    found = host.predict(WEIGHTS, *on(host, X), model=classifier(host))
    expected = by_hand_classes()
    assert_equal(found, {name: expected[name] for name in ("probabilities", "mean_entropy")})
    assert set(found.coords) == {"row", "class"}


def test_draws_of_one_chain_or_several(host):
    flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in REGRESSION.items()}
    found = host.predict(flat, *on(host, X, VALUES), model=regression(host), functions=True)
    expected = by_hand_regression()
    one_chain = {
        n: expected[n].reshape(1, -1, *expected[n].shape[2:]) for n in found.data_vars if "chain" in found[n].dims
    }
    assert set(one_chain) == {"functions", "noise_sd", "draw_log_density"}
    assert_equal(found, expected | one_chain)


def test_some_draws_of_each_chain(host):
    found = host.predict(REGRESSION, *on(host, X, VALUES), model=regression(host), functions=True, num_draws=3)
    np.testing.assert_array_equal(found["draw"], [0, 2, 4])
    expected = by_hand_regression()["functions"][:, :6:2]
    np.testing.assert_allclose(found["functions"], expected)
    np.testing.assert_allclose(found["mean"], expected.mean((0, 1)))
    assert found.attrs["num_draws"] == 6


def test_a_model_without_a_plate(host):
    def model(x, y=None):
        w = host.ppl.sample("w", normal(host, [3]))
        noise = host.ppl.sample("noise", host.dist.HalfNormal(host.array(1.0)))
        host.ppl.sample("y", host.dist.Normal(x @ w, noise), obs=y)

    found = host.predict(REGRESSION, *on(host, X, VALUES), model=model, functions=True, row_batch_size=4)
    assert_equal(found, by_hand_regression())


def test_a_distribution_that_rows_share(host):
    """Its parameters have no rows, and the plate expands it."""

    def model(x):
        w = host.ppl.sample("w", normal(host, [3]))
        with host.ppl.plate("data", len(x)):
            host.ppl.sample("y", host.dist.Bernoulli(logits=w.sum()), obs=x)

    labels = LABELS % 2 * 1.0
    found = host.predict(LINEAR, *on(host, labels), model=model, row_batch_size=4)
    p = (1 / (1 + np.exp(-LINEAR["w"].sum(-1)))).mean()
    np.testing.assert_allclose(found["probabilities"], np.tile([1 - p, p], (N, 1)))
    np.testing.assert_allclose(found["log_density"], np.log(np.where(labels, p, 1 - p)))
    np.testing.assert_array_equal(found["observed"], labels)
    assert found["observed"].dtype == np.int64


# ---- the exact inequalities, and stability


def test_jensen_and_mutual_information(host):
    found = host.predict(WEIGHTS, *on(host, X, LABELS), model=classifier(host), functions=True)
    assert float(found["log_density"].sum()) > float(found["draw_log_density"].mean())
    information = entr(found["probabilities"]).sum("class") - found["mean_entropy"]
    assert float(information.min()) > 0
    p = found["functions"].values.reshape(-1, N, CLASSES)
    expected = diagnostics.mutual_information(p)
    np.testing.assert_allclose(
        diagnostics.mutual_information(found["probabilities"], found["mean_entropy"]), expected, rtol=1e-9
    )
    one = {name: value[:, :1].repeat(3, axis=1)[:1] for name, value in WEIGHTS.items()}  # equal draws: both are equal
    found = host.predict(one, *on(host, X, LABELS), model=classifier(host))
    np.testing.assert_allclose(float(found["log_density"].sum()), found["draw_log_density"].values[0], rtol=1e-12)
    np.testing.assert_allclose(entr(found["probabilities"]).sum("class"), found["mean_entropy"], rtol=1e-12)


def test_diagnostics_take_the_results(host):
    found = host.predict(WEIGHTS, *on(host, X, LABELS), model=classifier(host), functions=True)
    assert diagnostics.function_diagnostics(found["functions"])["r_hat"].dims == ("row", "class")
    diagnostics.accuracy(found["probabilities"], found["observed"])


def test_far_rows_and_large_means(host):
    """Densities that underflow, and means beside which their spread is small."""
    draws = {"w": np.array([[1.0, 2e-9, 0.0], [1.0, 4e-9, 0.0], [1.0, 0.0, 0.0]]), "noise": np.array([1.0, 1e-3, 1.0])}
    x, y = np.tile([1e6, 1.0, 0.0], (2, 1)), np.array([1e6 + 100.0, 1e6])
    with np.errstate(divide="raise", invalid="raise"):
        found = host.predict(draws, *on(host, x, y), model=regression(host), draw_batch_size=2)
    mean = x @ draws["w"].T
    np.testing.assert_allclose(found["function_sd"], mean.std(1), rtol=0.1)
    log_p = stats.norm(mean, draws["noise"]).logpdf(y[:, None])
    np.testing.assert_allclose(found["log_density"], logsumexp(log_p, axis=1) - np.log(3), rtol=1e-9)


def test_an_impossible_observation_has_density_zero(host):
    def response(f):
        return host.dist.Categorical(logits=f[..., None] * 0 + host.array(np.array([-np.inf, 0.0])))

    y = np.where(np.arange(N) == 3, 0, 1)
    with np.errstate(all="raise"):
        found = host.predict(LINEAR, *on(host, X, y), model=in_plate(host, response), draw_batch_size=5)
    np.testing.assert_array_equal(found["log_density"], np.where(y, 0.0, -np.inf))
    np.testing.assert_array_equal(found["mean_entropy"], 0.0)


@pytest.mark.parametrize("given", ["logits", "probs"])
def test_class_probabilities_of_single_precision(host, given):
    """They sum to one also where the logits are large."""

    def response(f):
        scores = host.array(np.array([0.0, 1.0, 3.0], np.float32)) * f[..., None]
        positive = scores**2 + 2.0
        normalised = positive / positive.sum(-1)[..., None]
        return host.dist.Categorical(**{given: scores + 1e4 if given == "logits" else normalised})

    draws, x = {"w": LINEAR["w"].astype(np.float32)}, X.astype(np.float32)
    found = host.predict(draws, host.array(x), None, model=in_plate(host, response), functions=True)
    f = (draws["w"] @ x.T).astype(np.float64)[..., None] * [0.0, 1.0, 3.0]
    expected = softmax(f, -1) if given == "logits" else (f**2 + 2) / (f**2 + 2).sum(-1, keepdims=True)
    np.testing.assert_allclose(found["functions"].sum("class"), 1.0, rtol=3e-7)
    np.testing.assert_allclose(found["functions"], expected, rtol=5e-3 if given == "logits" else 1e-5)


# ---- speed and memory


def test_draws_together():
    """Many for few rows and weights, one for a convolution."""
    together = [predictions._together(rows, [(8, 50), (50,)]) for rows in (1, 50, 1000)]
    assert together == [32768, 655, 32]
    assert predictions._together(1000, [(784, 100), (100,), (100, 10), (10,)]) == 25
    assert predictions._together(1, [(10_000, 1000)]) == 1
    assert predictions._together(1, [(3, 3, 8, 8)]) == 1


MEMORY = """
    import resource
    import numpy as np
    ROWS, DRAWS, WIDTH = 2000, 400, 500   # hidden units of all draws and rows: 1.6 GB

    def model(x, y):
        w = ppl.sample("w", dist.Normal(zero, one).expand([4, WIDTH]).to_event(2))
        v = ppl.sample("v", dist.Normal(zero, one).expand([WIDTH]).to_event(1))
        with ppl.plate("data", len(x)) as i:
            ppl.sample("y", dist.Normal(tanh(x[i] @ w) @ v, one), obs=y[i])

    rng = np.random.default_rng(0)
    draws = {"w": rng.normal(size=(DRAWS, 4, WIDTH)), "v": rng.normal(size=(DRAWS, WIDTH))}
    draws = {name: array(value.astype("float32")) for name, value in draws.items()}
    x, y = array(rng.normal(size=(ROWS, 4)).astype("float32")), array(np.zeros(ROWS, "float32"))
    few = {name: value[:2] for name, value in draws.items()}
    predict(few, x[:3], y[:3], model=model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = predict(draws, x, y, model=model)
    assert found["log_density"].shape == (ROWS,)
    predict(draws, x, y, model=model, row_batch_size=50, draw_batch_size=DRAWS)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
IMPORTS = {
    "numpyro": """
    import jax, jax.numpy as jnp, numpyro as ppl, numpyro.distributions as dist
    from bnn_ppl.numpyro import predict
    zero, one, tanh, array = 0.0, 1.0, jnp.tanh, jnp.asarray
    """,
    "pyro": """
    import torch, pyro as ppl, pyro.distributions as dist
    from bnn_ppl.pyro import predict
    zero, one, tanh, array = torch.tensor(0.0), torch.tensor(1.0), torch.tanh, torch.tensor
    """,
}


def test_memory_is_bounded(host, tmp_path):
    code = textwrap.dedent(IMPORTS[host.name]) + textwrap.dedent(MEMORY)
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    # Hidden units of all draws on 1000 rows take 800 MB, those of one batch, 32 draws on 1000 rows, 64 MB. In the
    # second call, all rows take 1.6 GB and one batch 40 MB.
    assert float(ran.stdout) < 300
