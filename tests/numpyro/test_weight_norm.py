"""Weight norms and hidden temperatures of runs of NumPyro's SGHMC; their laws are in tests/diagnostics."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from jax import random
from numpyro.infer import MCMC

import bnn_ppl
from bnn_ppl.diagnostics import describe_temperature, hidden_temperature, weight_norm
from bnn_ppl.numpyro import SGHMC
from tests import laws


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def run(kernel, start, *, draws, warmup=0, chains=1):
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=draws, num_chains=chains, chain_method="vectorized",
                progress_bar=False)  # fmt: skip
    mcmc.run(random.key(0), init_params=start)
    return mcmc


def test_masses_by_site():
    """Two sites of unequal masses, far from equilibrium; the wrong masses are seen."""

    def model():
        numpyro.sample("a/b", dist.Normal(0.0, 0.8).expand([300]).to_event(1))
        numpyro.sample("c", dist.Normal(0.0, 1.5).expand([200]).to_event(1))

    kernel = SGHMC(model, step_size=0.02, friction=0.5, mass={"a/b": 0.7, "c": 2.0}, temperature=0.5, steps_per_draw=2)
    tree = bnn_ppl.to_arviz(
        run(kernel, {"a/b": jnp.full((8, 300), 3.0), "c": jnp.zeros((8, 200))}, draws=400, chains=8)
    )
    found = weight_norm(tree)
    assert dict(zip(found["part"].values, found["dimension"].values, strict=True)) == {"all": 500, "a.b": 300, "c": 200}
    assert abs(found["balance_z"].values).max() < 4
    for settings, low, high in (({}, 0, 2), ({"mass": {"a/b": 2.0, "c": 0.7}}, 5, np.inf)):  # 7 / 5 if right
        whole = weight_norm(tree, **settings).sel(part="all")
        squares = ((whole["measured_rate"] - whole["predicted_rate"]) / whole["rate_error"]) ** 2
        assert low < squares.sel(moment="position_momentum").mean() < high
    sites = found["moments"].sel(part=["a.b", "c"], moment="position_norm_sq").sum("part")
    np.testing.assert_allclose(found["moments"].sel(part="all", moment="position_norm_sq"), sites, rtol=1e-9)
    expected = found["expected"].sel(statistic="momentum_norm_sq").values
    assert expected == pytest.approx([0.5 * (0.7 * 300 + 2.0 * 200), 0.5 * 0.7 * 300, 0.5 * 2.0 * 200])


@pytest.mark.filterwarnings("ignore:resample_scale=3.0 differs")
@pytest.mark.parametrize("jitter", [False, True])
def test_intervals_with_a_refresh_are_left_out(jitter):
    """Steps count from the start of warm-up; with those intervals the balance of r'r would be far off."""
    kernel = SGHMC(
        potential_fn=lambda z: 0.5 * (z["x"] ** 2).sum(), step_size=0.05, friction=0.3, steps_per_draw=2,
        resample_every=10, resample_scale=3.0, resample_jitter=jitter,
    )  # fmt: skip
    statistics = bnn_ppl.to_arviz(run(kernel, {"x": jnp.full(400, 3.0)}, draws=600, warmup=3))["sample_stats"]
    statistics = statistics.to_dataset() if isinstance(statistics, xr.DataTree) else statistics
    found = weight_norm(statistics).sel(part="all")
    free = np.isfinite(found["measured_rate"].values[2])
    assert 0.7 < free.mean() < 0.9
    if not jitter:  # draw i ends after step 2 (3 + 1 + i)
        assert free.tolist() == [not any(step % 10 == 0 for step in (8 + 2 * i, 9 + 2 * i)) for i in range(599)]
    assert abs(found["balance_z"].values).max() < 4
    jumps = np.diff(found["moments"].values[2, 0])
    assert np.abs(jumps[~free]).mean() > 2 * np.abs(jumps[free]).mean()
    blind = statistics.copy()
    blind.attrs = {name: value for name, value in statistics.attrs.items() if name != "resample_every"}
    assert abs(weight_norm(blind).sel(part="all")["balance_z"].values).max() > 4


@pytest.mark.filterwarnings("ignore:resample_scale=0.2 differs")
def test_hidden_temperature_of_a_run():
    """Draws where the momentum is redrawn: the configurational temperature is that of the law."""
    k = np.repeat([1.0, 4.0], 500)
    kernel = SGHMC(
        potential_fn=lambda z: 0.5 * (k * z["x"] ** 2).sum(), step_size=0.02, friction=1.0, mass=5.0,
        resample_every=50, resample_scale=0.2, steps_per_draw=50,
    )  # fmt: skip
    tree = bnn_ppl.to_arviz(run(kernel, {"x": jnp.zeros(1000)}, draws=400, warmup=60))
    law = hidden_temperature(curvature=np.array([1.0, 4.0]), interval=1.0, friction=1.0, resample_scale=0.2, mass=5.0)
    assert law[0] == pytest.approx(0.300712608651)
    measured = tree["sample_stats"]["configurational_temperature"].values
    assert abs(laws.z_over_units(measured.reshape(20, 20).mean(1), law.mean())) < 4
    sentence = describe_temperature(tree)
    pattern = (
        r"The momentum is redrawn every 50 steps at 0\.2 while the temperature is 1: the draws are at (0\.\d+) ± "
        r"0\.0\d+ by their configurational temperature, between the two; leave resample_scale out to sample at 1\."
    )
    assert float(re.fullmatch(pattern, sentence)[1]) == pytest.approx(law.mean(), abs=0.01)
