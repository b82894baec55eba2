"""Moments, their rates and hidden temperatures: Table B and the discrete laws."""

import json
import re

import numpy as np
import pytest
import xarray as xr

from bnn_ppl.diagnostics import describe_temperature, hidden_temperature, weight_norm
from bnn_ppl.settings import INTEGRATORS
from tests import laws

CHAINS = 50  # into which independent coordinates are cut


def summed(values):
    return values.reshape(CHAINS, -1).sum(axis=1)


def simulate(
    *, curvature, mass, friction, temperature, start, step_size, draws, steps_per_draw, units=10_000, noise=0.0,
    integrator="baoab", seed=0,
):  # fmt: skip
    """sample_stats of a Gaussian from E theta^2, E r^2 = start (E theta r = 0), with what to_arviz adds."""
    rng = np.random.default_rng(seed)
    step, coefficients, _ = INTEGRATORS[integrator]
    numbers = coefficients(step_size, friction, mass, temperature, 0.0)
    z = np.full(units, np.sqrt(start[0]))
    gradient = curvature * z
    r = np.sqrt(start[1]) * rng.normal(size=units) + 0.5 * step_size * gradient  # before the kick of the first step
    kept = []
    for i in range((draws - 1) * steps_per_draw + 1):
        if i:
            z, r = step(z, r, gradient, rng.normal(size=units), numbers)
            gradient = curvature * z + np.sqrt(noise) * rng.normal(size=units)
        if i % steps_per_draw == 0:
            kept.append([summed(a) for a in (z * z, z * r, r * r, r * gradient, z * gradient, gradient**2)])
    names = ["position_norm_sq", "position_momentum", "momentum_norm_sq", "momentum_gradient"]
    names += ["configurational_temperature", "gradient_norm"]
    values = dict(zip(names, np.moveaxis(np.array(kept), 0, -1), strict=True))
    values["configurational_temperature"] /= units / CHAINS
    values["gradient_norm"] = np.sqrt(values["gradient_norm"])
    values["kinetic_temperature"] = values["momentum_norm_sq"] / (mass * units / CHAINS)
    values |= {n: np.full((CHAINS, draws), x) for n, x in (("temperature", temperature), ("step_size", step_size))}
    attributes = {"mass": mass, "friction": friction, "integrator": integrator, "steps_per_draw": steps_per_draw}
    return xr.Dataset({name: (("chain", "draw"), value) for name, value in values.items()}, attrs=attributes)


# k, m, g, T, (E theta^2, E r^2) at the start, and (E theta^2, E theta r, E r^2) by time
TABLE_B = [
    (
        (2, 1, 0.5, 1, (9, 0)),
        {
            0.5: (5.49128232665, -5.61613852285, 6.28631713726),
            1: (0.845278414542, -2.5856681327, 11.3067677927),
            2: (2.86433674793, 1.46712085954, 1.42383713312),
            5: (1.03879981426, -0.584638015397, 1.52807935717),
        },
    ),
    (
        (2, 1, 0.5, 0.1, (9, 0)),
        {
            1: (0.702432689654, -2.7220812467, 10.9524209869),
            20: (0.0502800992993, 2.06001386276e-4, 0.100144919458),
        },
    ),
    (
        (1, 3, 0.003, 1, (4, 3)),
        {
            2: (1.49105543051, -1.92096129526, 10.5146145804),
            20: (1.80484708013, 2.26966378511, 9.40043782801),
        },
    ),
    (
        (1, 1, 4, 1, (0, 0)),
        {1: (0.278125745705, 0.183028464035, 0.953129120379), 5: (0.914662929065, 0.0228659980516, 0.993873074607)},
    ),
]
STEP = 0.005


def table_b(case, **changes):
    (k, m, g, T, start), table = TABLE_B[case]
    draws = round(max(table) / STEP / 2) + 1  # a draw every two steps
    statistics = simulate(
        curvature=k, mass=m, friction=g, temperature=T, start=start, step_size=STEP, draws=draws, steps_per_draw=2
    )
    statistics = statistics.assign(temperature=statistics["temperature"] * changes.pop("temperature_factor", 1))
    return weight_norm(statistics, **changes), table


def z_scores(found):
    """z-scores of each interval and of the balance over the run, where a rate may be off by 1e-4 of the largest."""
    found = found.sel(part="all")
    allowed = 1e-4 * abs(found["predicted_rate"]).max("interval")
    at_intervals = (found["measured_rate"] - found["predicted_rate"]) / np.hypot(found["rate_error"], allowed)
    return at_intervals.values, (found["balance"] / np.hypot(found["balance_error"], allowed)).values


@pytest.mark.parametrize("case", range(len(TABLE_B)))
def test_table_b(case):
    found, table = table_b(case)
    assert float(found["dimension"].item()) == 10_000 / CHAINS
    for time, expected in table.items():
        at = found["moments"].sel(part="all").isel(draw=int(np.argmin(abs(found["time"].values - time)))) / 200
        assert found["time"].values[np.argmin(abs(found["time"].values - time))] == pytest.approx(time)
        for moment, value in zip(found["moment"].values, expected, strict=True):
            z = laws.z_over_units(at.sel(moment=moment).values, value)
            assert abs(z) < 4, (time, moment, z)
    by_interval, balance = z_scores(found)
    assert (abs(balance) < 4).all(), balance
    assert abs(by_interval).max() < 6  # of thousands
    assert (np.mean(by_interval**2, axis=1) < 1.3).all()


@pytest.mark.parametrize(
    "wrong", [{"mass": 1.1}, {"friction": 0.6}, {"temperature_factor": 1.2}], ids=["mass", "friction", "temperature"]
)
def test_wrong_settings_break_the_balance(wrong):
    by_interval, balance = z_scores(table_b(0, **wrong)[0])
    assert max(abs(balance).max(), abs(by_interval.mean(-1)).max() * by_interval.shape[-1] ** 0.5) > 6


@pytest.mark.parametrize("noise", [0.0, 3.0])
@pytest.mark.parametrize("integrator", ["baoab", "symplectic_euler"])
def test_stationary(integrator, noise):
    """At a large step: 0, m d T and 0 exactly, and with gradient noise what the module says, to O(h^3)."""
    k, m, g, T, h = 2.0, 1.5, 0.8, 0.7, 0.4
    statistics = simulate(
        curvature=k, mass=m, friction=g, temperature=T, start=(T / k, m * T), step_size=h, draws=400,
        steps_per_draw=1, noise=noise, integrator=integrator, units=5000,
    ).isel(draw=slice(100, None))  # fmt: skip
    found = weight_norm(statistics).sel(part="all")
    d = float(found["dimension"])
    law = laws.stationary(laws.UNDERDAMPED[integrator](h, k, M=m, C=g, T=T), V=noise)
    lag = -(h**3) * noise / (2 * m * (4 - h**2 * k / m)) if integrator == "baoab" else 0.0
    expected = {
        "position_momentum": lag,
        "position_gradient": k * law[0, 0],
        "momentum_gradient": -0.5 * h * noise + k * lag,
    }
    if noise == 0:
        expected["momentum_norm_sq"] = m * T
    for name, value in expected.items():
        z = (float(found["mean"].sel(statistic=name)) - d * value) / float(found["mean_error"].sel(statistic=name))
        assert abs(z) < 4, (name, z)
    assert found["expected"].values == pytest.approx([0, d * T, m * d * T, 0])
    raw = statistics["position_momentum"].mean(axis=1).values
    assert abs(laws.z_over_units(raw, d * law[0, 1])) < 4  # h T d / 2 for BAOAB without noise
    if integrator == "baoab" and noise == 0:
        assert law[0, 1] == pytest.approx(h * T / 2)


def two_sites(integrator):
    """A run with sites of other curvatures and masses, at a step large enough for the terms in |g~|^2 to matter."""
    m = {"heavy": 3.0, "light": 0.5}
    common = {"friction": 0.8, "temperature": 0.7, "step_size": 0.3, "draws": 400, "steps_per_draw": 1, "units": 5000}
    runs = [
        simulate(
            curvature=k, mass=m[site], start=(0.7 / k, m[site] * 0.7), integrator=integrator, seed=seed, **common
        )
        for seed, (site, k) in enumerate({"heavy": 2.0, "light": 1.0}.items())
    ]  # fmt: skip
    names = [name for name in runs[0] if name not in ("temperature", "step_size")]
    by_site = xr.concat([run[names] for run in runs], xr.DataArray(list(m), dims="site"))
    whole = {name: by_site[name].mean("site") if "temperature" in name else by_site[name].sum("site") for name in names}
    whole["gradient_norm"] = np.sqrt((by_site["gradient_norm"] ** 2).sum("site"))
    statistics = runs[0].assign(whole).assign_coords(site=list(m))
    statistics = statistics.assign({f"site_{name}": by_site[name].transpose(..., "site") for name in names})
    return statistics.assign_attrs(mass=json.dumps(m)).isel(draw=slice(100, None))


@pytest.mark.parametrize("integrator", ["baoab", "symplectic_euler"])
def test_by_site(integrator):
    found = weight_norm(two_sites(integrator))
    assert found["part"].values.tolist() == ["all", "heavy", "light"]
    assert found["dimension"].values.tolist() == [200, 100, 100]
    assert found["expected"].sel(statistic="momentum_norm_sq").values == pytest.approx([245, 210, 35])
    if integrator == "symplectic_euler":  # whose Var theta is off by O(h^2), and with it theta'grad U
        found = found.drop_sel(statistic="position_gradient", moment="position_momentum")
    assert abs(found["mean_z"]).max() < 4, found["mean_z"]
    assert abs(found["balance_z"]).max() < 4, found["balance_z"]


# Momentum refresh at another temperature

HIDDEN = [  # k, M, alpha, g, T, tau, beta, k Var theta
    (1, 1, 1, 1, 1, 1, 1, 1.0),
    (1, 1, 1, 1, 1, 1, 0.001, 0.496551950594),
    (1, 1, 5, 1, 1, 1, 1, 0.300712608651),
    (1, 1, 3, 0.001, 1, 2, 0.001, 8.74677668e-4),
    (1, 1, 3, 0.001, 1, 2, 3, 1.0),
    (2, 0.5, 3, 0.5, 0.5, 1.5, 0.1, 0.216810125666),
    (1, 1, 1, 0, 1, 1, 0.3, 0.3),
]


def test_hidden_temperature():
    k, M, alpha, g, T, tau, beta, expected = np.array(HIDDEN).T
    found = hidden_temperature(
        curvature=k, interval=tau, friction=g, resample_scale=beta / alpha, temperature=T, mass=alpha * M
    )
    np.testing.assert_allclose(found, expected, rtol=2e-9)
    for friction in (2.0, 2.0 + 1e-9, 40.0):  # critical damping and beyond, of the linear recursion
        one = hidden_temperature(curvature=1.0, interval=1.0, friction=friction, resample_scale=0.3)
        steps = laws.refreshed("baoab", 1e-3, 1.0, L=1000, scale=0.3, C=friction)
        assert one == pytest.approx(laws.stationary(steps)[0, 0], rel=2e-3)


def sentence(scale, values, every=10):
    attributes = {"resample_every": every, "resample_scale": scale}
    data = {"configurational_temperature": values, "temperature": np.ones_like(values)}
    statistics = xr.Dataset({n: (("chain", "draw"), v) for n, v in data.items()})
    statistics.attrs = {name: value for name, value in attributes.items() if value is not None}
    return describe_temperature({"sample_stats": statistics})


def test_sentences():
    values = 3 + 0.1 * np.random.default_rng(0).normal(size=(2, 400))
    assert "not between the two, so not settled" in sentence(0.5, values)
    few = sentence(0.5, values[:, :3])
    assert "with too few draws for an error" in few
    assert "nan" not in few
    assert "every 10 steps at the temperature, 1: the draws are at 3" in sentence(None, values)
    assert "on a schedule while the temperature is 1" in sentence(json.dumps("CosineRestarts"), values)
    with pytest.raises(ValueError, match="no momentum refresh to describe"):
        sentence(None, values, every=None)
    with pytest.raises(ValueError, match="has no 'configurational_temperature'"):
        describe_temperature({"sample_stats": xr.Dataset()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curvature": 0.0}, "curvature must be finite and greater than 0, got"),
        ({"interval": -1.0}, "interval must be finite and greater than 0, got"),
        ({"resample_scale": [0.1, -0.1]}, "resample_scale must be finite and at least 0, got"),
        ({"interval": np.pi, "friction": 0.0}, "is a multiple of half a period of a coordinate without friction"),
    ],
)
def test_bad_hidden_temperature(changes, message):
    given = {"curvature": 1.0, "interval": 1.0, "friction": 1.0, "resample_scale": 0.5} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        hidden_temperature(**given)


def small(**attributes):
    one = {"curvature": 1.0, "mass": 2.0, "friction": 0.5, "temperature": 1.0, "start": (1, 1), "step_size": 0.1}
    statistics = simulate(**one, draws=20, steps_per_draw=1, units=500)
    statistics.attrs |= attributes
    return statistics


def test_settings_from_attributes_or_arguments():
    statistics = small()
    bare = statistics.copy()
    bare.attrs = {}
    given = {"mass": 2.0, "friction": 0.5, "integrator": "baoab", "steps_per_draw": 1}
    xr.testing.assert_identical(weight_norm(bare, **given), weight_norm({"sample_stats": statistics}))
    for name in given:
        with pytest.raises(ValueError, match=f"no attribute '{name}': give {name}= of the kernel"):
            weight_norm(bare, **{n: value for n, value in given.items() if n != name})
    thinned = weight_norm(small(thinning=3))
    assert thinned["time"].values[-1] == pytest.approx(19 * 0.3)


def test_one_chain_and_diverging_draws():
    statistics = small().isel(chain=[0])
    statistics["diverging"] = statistics["step_size"] * 0 > 1
    statistics["diverging"][0, 7] = True
    found = weight_norm(statistics)
    assert np.isnan(found["rate_error"].values).all()
    assert np.flatnonzero(np.isnan(found["measured_rate"].values[0, 0])).tolist() == [6]
    assert np.isnan(found["balance_error"].values).all()  # too few draws for batches
    assert np.isfinite(found["balance"].values).all()


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        (small().drop_vars("momentum_gradient"), "sample_stats has no 'momentum_gradient'"),
        (two_sites("baoab").drop_vars("site_gradient_norm"), "sample_stats has no 'site_gradient_norm'"),
        (small(integrator="euler"), "integrator must be one of 'baoab', 'symplectic_euler', got 'euler'"),
        (small(step_size='"Cyclical"'), "step_size=Cyclical takes draws at unequal steps"),
        (small(mass='{"w": 1.0}'), "mass names the sites ['w'] and sample_stats has []: give each one"),
        (small(mass="adapt"), "mass='adapt' changes over the run"),
        (small(kernel="SGNHT"), "the friction of SGNHT's thermostat changes at each step"),
        (small() * np.nan, "sample_stats position_norm_sq has 1000 NaN or infinite values"),
        (small().assign(kinetic_temperature=0 * small()["step_size"]), "kinetic_temperature is 0 in all draws"),
    ],
)
def test_bad_trees(statistics, message):
    statistics.attrs = statistics.attrs or small().attrs
    with pytest.raises(ValueError, match=re.escape(message)):
        weight_norm(statistics)
