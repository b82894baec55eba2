"""Temperatures: expectations against the exact laws, chains simulated in NumPy, and verdicts."""

import re

import arviz as az
import numpy as np
import pytest
import xarray as xr

from bnn_ppl import diagnostics as d
from bnn_ppl import updates
from bnn_ppl.settings import INTEGRATORS
from tests import laws

# T, h, k, M, C, V: all unequal, and stable for both integrators.
NUMBERS = {"temperature": 0.3, "step_size": 0.4, "curvature": 2.5, "mass": 1.7, "friction": 0.8}
V = 0.6


def simulate(
    integrator, *, step_size, curvature, temperature=1.0, mass=1.0, friction=1.0, size=1000, draws=100, burn=100,
    noise=0.0, start=0.0, steps_per_draw=1, resample_every=None, resample_scale=None, seed=0,
):  # fmt: skip
    """Positions, gradients and momenta of a chain on U = curvature theta^2 / 2, shapes (1, draw, size)."""
    rng = np.random.default_rng(seed)
    coefficients = INTEGRATORS[integrator][1]
    z = start + np.zeros(size)
    r = np.sqrt(temperature * mass) * rng.normal(size=size)
    kept = []
    for step in range((burn + draws) * steps_per_draw):
        due = resample_every is not None and step % resample_every == 0
        if due:
            scale = temperature if resample_scale is None else resample_scale
            r = np.sqrt(scale * mass) * rng.normal(size=size)
        numbers = coefficients(step_size, friction, mass, temperature, 0.0, 0.5 if due else 1.0)
        gradient = curvature * z + np.sqrt(noise) * rng.normal(size=size)
        z, r = INTEGRATORS[integrator][0](z, r, gradient, rng.normal(size=size), numbers)
        if step >= burn * steps_per_draw and (step + 1) % steps_per_draw == 0:
            kept.append((z, curvature * z, r))
    return tuple(np.array(part)[None] for part in zip(*kept, strict=True))


def tree_of(chains, *, temperature=1.0, step_size=0.1, mass=1.0, dims=None, **settings):
    """What to_arviz makes of recorded chains (position, gradient, momentum) by site."""
    parts = [{site: chain[i] for site, chain in chains.items()} for i in range(3)]
    statistics = d.site_temperatures(*parts, mass=mass)
    if set(chains) == {"w"}:
        statistics = statistics[["kinetic_temperature", "configurational_temperature"]]
    like = statistics["configurational_temperature"]
    statistics["temperature"] = xr.zeros_like(like) + temperature
    statistics["step_size"] = xr.zeros_like(like) + step_size
    norms = [(r**2).reshape(*r.shape[:2], -1).sum(-1) for r in parts[2].values()]
    statistics["momentum_norm_sq"] = (("chain", "draw"), np.sum(norms, axis=0))
    statistics.attrs = {"kernel": "SGHMC", "integrator": "baoab", "friction": 1.0, "mass": mass, "steps_per_draw": 1}
    statistics.attrs |= settings
    posterior = xr.Dataset({n: (("chain", "draw", n + "_dim"), z) for n, z in parts[0].items()})
    tree = xr.DataTree.from_dict({"posterior": posterior, "sample_stats": statistics})
    return tree if hasattr(az, "convert_to_datatree") else az.InferenceData.from_datatree(tree)


def verdicts(table):
    return {(row.quantity, row.part): row.verdict for row in table.itertuples()}


# Expectations


@pytest.mark.parametrize("noise", [0.0, V])
@pytest.mark.parametrize("integrator", ["baoab", "symplectic_euler"])
def test_expectations_are_those_of_the_exact_law(integrator, noise):
    h, k, M, C, T = (NUMBERS[name] for name in ("step_size", "curvature", "mass", "friction", "temperature"))
    law = laws.stationary(laws.UNDERDAMPED[integrator](h, k, M=M, C=C, T=T), V=noise)
    given = {**NUMBERS, "gradient_noise_variance": noise}
    assert d.expected_configurational_temperature(integrator, **given) == pytest.approx(k * law[0, 0], rel=1e-12)
    assert d.expected_kinetic_temperature(integrator, **given) == pytest.approx(law[1, 1] / M, rel=1e-12)


@pytest.mark.parametrize("noise", [0.0, V])
def test_expectation_of_sgld(noise):
    law = laws.stationary(laws.sgld(0.2, 3.0, T=0.4), V=noise)
    found = d.expected_configurational_temperature(
        "euler", step_size=0.2, curvature=3.0, temperature=0.4, gradient_noise_variance=noise
    )
    assert found == pytest.approx(3.0 * law[0, 0], rel=1e-12)


def test_table_values():
    euler = {"step_size": 0.25, "friction": 0.5, "curvature": 4.0}
    assert d.expected_configurational_temperature("symplectic_euler", **euler) == pytest.approx(1.0714285714)
    assert d.expected_kinetic_temperature("symplectic_euler", **euler) == pytest.approx(1.1428571429)
    assert d.expected_configurational_temperature("euler", step_size=[0.05, 0.1], curvature=4.0) == pytest.approx(
        [10 / 9, 1.25]
    )
    # Without curvature the momentum alone: 1 / (1 - a / 2), at the momenta 0.98 and 0.9 of deep learning.
    for a, expected in ((0.02, 1 / 0.99), (0.1, 1 / 0.95)):
        found = d.expected_kinetic_temperature("symplectic_euler", step_size=0.01, friction=a / 0.01)
        assert found == pytest.approx(expected)
    assert d.expected_kinetic_temperature("baoab", step_size=0.9, curvature=4.0, temperature=0.1) == 0.1
    assert d.expected_kinetic_temperature("symplectic_euler", step_size=0.1, temperature=0.0) == 0


@pytest.mark.parametrize(("every", "steps_per_draw"), [(1, 1), (3, 1), (4, 6), (5, 10)])
@pytest.mark.parametrize("integrator", ["baoab", "symplectic_euler"])
def test_expectation_under_refresh(integrator, every, steps_per_draw):
    """The momentum's exact law on a flat potential, at the steps where draws are taken."""
    step = {"h": 0.4, "k": 0.0, "M": 1.7, "C": 0.8, "T": 0.3}
    periods = laws.refreshed(integrator, L=every, scale=0.9, **step) * steps_per_draw
    mean, covariance = np.zeros(2), np.zeros((2, 2))
    variances = [S[1, 1] for _, S in laws.transition(periods, mean, covariance)]
    expected = np.mean(variances[steps_per_draw - 1 :: steps_per_draw]) / 1.7
    arguments = {"step_size": 0.4, "mass": 1.7, "friction": 0.8, "temperature": 0.3, "steps_per_draw": steps_per_draw}
    found = d.expected_kinetic_temperature(integrator, resample_every=every, resample_scale=0.9, **arguments)
    assert found == pytest.approx(expected, rel=1e-12)
    at_temperature = d.expected_kinetic_temperature("baoab", resample_every=every, **arguments)
    assert at_temperature == pytest.approx(0.3)


# Measured chains


@pytest.mark.parametrize(
    ("dimension", "lower", "upper"),
    [(10, 0.21559, 2.51882), (1000, 0.88856, 1.11895), (100_000, 0.98852, 1.01156)],
)
def test_temperature_band(dimension, lower, upper):
    assert d.temperature_band(dimension) == pytest.approx((lower, upper), abs=6e-6)
    assert d.temperature_band(dimension, level=0.5)[0] > lower


def test_a_chain_has_its_expected_temperatures():
    """The values at d = 1000, T = 0.5, k = 4, h = 0.25, friction 0.5: 0.5357 and 0.5714."""
    given = {"step_size": 0.25, "friction": 0.5, "curvature": 4.0, "temperature": 0.5}
    chain = simulate("symplectic_euler", draws=400, **given)
    found = d.site_temperatures(*({"w": part} for part in chain))
    for name, function, value in (
        ("configurational", d.expected_configurational_temperature, 0.5357),
        ("kinetic", d.expected_kinetic_temperature, 0.5714),
    ):
        expected = function("symplectic_euler", **given)
        assert expected == pytest.approx(value, abs=5e-5)
        products = chain[0] * chain[1] if name == "configurational" else chain[2] ** 2
        assert abs(laws.z_over_units(products[0], expected)) < 4
        measured = found[f"{name}_temperature"].values
        assert measured.mean() == pytest.approx(expected, rel=0.01)
        error = d.batch_means_error(measured)
        assert abs(measured.mean() - expected) < 4 * error
        assert error < 0.005
    low, high = d.temperature_band(1000)
    kinetic = found["kinetic_temperature"].values / 0.57142857
    inside = ((kinetic > low) & (kinetic < high)).mean()
    assert inside > 0.96


def test_site_temperatures():
    position = {"a": np.full((1, 2, 3), 2.0), "b": np.ones((1, 2))}
    gradient = {"a": np.full((1, 2, 3), 0.5), "b": np.full((1, 2), 5.0)}
    momentum = {"a": np.full((1, 2, 3), 3.0), "b": np.full((1, 2), 4.0)}
    found = d.site_temperatures(position, gradient, momentum, mass={"a": 9.0, "b": 2.0})
    assert (found["site_configurational_temperature"].sel(site="a") == 1).all()
    assert (found["site_configurational_temperature"].sel(site="b") == 5).all()
    assert (found["configurational_temperature"] == (3 * 1 + 5) / 4).all()
    assert (found["site_kinetic_temperature"].sel(site="a") == 1).all()
    assert (found["site_kinetic_temperature"].sel(site="b") == 8).all()
    assert (found["kinetic_temperature"] == (3 * 1 + 8) / 4).all()
    assert not any("kinetic" in name for name in d.site_temperatures(position, gradient))


def test_an_origin_takes_noise_away():
    """U = k (theta - 5)^2 / 2: T_C has the mean T about any origin, and about 5 its smallest spread."""
    given = {"step_size": 0.1, "temperature": 0.5}
    z, gradient, _ = simulate("baoab", curvature=2.0, size=100, draws=2000, **given)
    about_0, about_5 = (
        d.site_temperatures({"w": z + 5}, {"w": gradient}, origin=origin)["configurational_temperature"].values
        for origin in (None, {"w": np.full(100, 5.0)})
    )
    for measured in (about_0, about_5):
        assert abs(measured.mean() - 0.5) < 4 * d.batch_means_error(measured)
    assert about_5.std() < 0.2 * about_0.std()


def test_batch_means_error():
    """Of independent draws s / sqrt(n); of an AR(1) that of its long-run variance."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 10_000))
    assert d.batch_means_error(x) == pytest.approx(1 / np.sqrt(20_000), rel=0.3)
    phi = 0.8
    for i in range(1, x.shape[1]):
        x[:, i] += phi * x[:, i - 1]
    assert d.batch_means_error(x) == pytest.approx(1 / (1 - phi) / np.sqrt(20_000), rel=0.3)
    # By hand: batches of 2, the first draw left out; correlation with the next batch -1/28, and 1/2.
    apart = [[9.0, 1, 3, 5, 7], [9.0, 2, 2, 0, 0], [9.0, 6, 6, 2, 2], [9.0, 0, 0, 1, 3]]
    assert d.batch_means_error(apart) == pytest.approx(np.std([2, 6, 2, 0, 6, 2, 0, 2], ddof=1) / np.sqrt(8))
    together = [[0.0] * 4, [0.0] * 4, [2.0] * 4, [2.0] * 4]
    assert d.batch_means_error(together) == pytest.approx(np.sqrt(8 / 7) / np.sqrt(8) * np.sqrt(3))
    assert d.batch_means_error(np.ones((2, 100))) == 0
    assert np.isnan(d.batch_means_error(x[:1, :55]))
    assert d.batch_means_error(x[:1, :64]) > 0


# The table


def test_a_chain_in_equilibrium_is_at_its_temperature():
    given = {"step_size": 0.1, "temperature": 0.3}
    chains = {"w": simulate("baoab", curvature=1.0, draws=200, **given)}
    table = d.temperature_table(tree_of(chains, **given))
    assert verdicts(table) == dict.fromkeys([("kinetic", "all"), ("configurational", "all")], "at its temperature")
    kinetic = table.iloc[0]
    assert kinetic.draws == 200
    assert (kinetic.temperature, kinetic.expected) == pytest.approx((0.3, 0.3))
    assert (kinetic.lower, kinetic.upper) == pytest.approx((0.3 * 0.88856, 0.3 * 1.11895), abs=2e-6)
    assert kinetic["mean"] == pytest.approx(0.3, rel=0.03)
    assert kinetic.z == pytest.approx((kinetic["mean"] - 0.3) / kinetic.error)
    assert np.isnan(table.iloc[1].lower)


def test_symplectic_euler_is_held_to_its_own_expectation():
    """At friction per step 0.5 the momentum is a third above T, as it should be."""
    given = {"step_size": 0.05, "friction": 10.0}
    chains = {"w": simulate("symplectic_euler", curvature=1.0, draws=400, burn=3000, steps_per_draw=20, **given)}
    table = d.temperature_table(tree_of(chains, integrator="symplectic_euler", **given))
    assert table.iloc[0].expected == pytest.approx(1 / 0.75)
    assert set(table.verdict) == {"at its temperature"}
    wrong = d.temperature_table(tree_of(chains, integrator="baoab", **given))
    assert wrong.iloc[0].verdict.startswith("too hot by 3")


def test_minibatch_noise_heats_both_temperatures():
    given = {"step_size": 0.1, "friction": 1.0}
    chains = {"w": simulate("baoab", curvature=1.0, noise=6.0, draws=200, **given)}
    table = d.temperature_table(tree_of(chains, **given))
    for verdict in table.verdict:
        assert re.fullmatch(r"too hot by \d+%: lower step_size, take larger batches, or raise friction", verdict)
    for row, function in zip(
        table.itertuples(),
        (d.expected_kinetic_temperature, d.expected_configurational_temperature),
        strict=True,
    ):
        assert row.mean == pytest.approx(
            function("baoab", curvature=1.0, gradient_noise_variance=6.0, **given), rel=0.05
        )
        assert row.z > 3


def test_a_chain_that_still_falls_is_told_apart():
    chains = {"w": simulate("baoab", step_size=0.1, friction=20.0, curvature=1.0, start=3.0, burn=0, draws=300)}
    found = verdicts(d.temperature_table(tree_of(chains, friction=20.0)))
    assert found["kinetic", "all"] == "at its temperature"
    assert re.fullmatch(
        r"still moving, from [\d.]+ in the first half of the draws to [\d.]+: warm up longer",
        found["configurational", "all"],
    )


def test_a_chain_that_has_not_spread_out_is_too_cold():
    given = {"step_size": 0.01, "friction": 50.0}
    chains = {"w": simulate("baoab", curvature=0.1, burn=2000, draws=100, **given)}
    found = verdicts(d.temperature_table(tree_of(chains, **given), tolerance=0.4))
    assert found["kinetic", "all"] == "at its temperature"
    assert re.match(r"too cold by \d+%: the weights have not spread out yet", found["configurational", "all"])


def test_one_site_out_of_equilibrium():
    given = {"step_size": 0.1, "friction": 1.0}
    good = simulate("baoab", curvature=1.0, draws=200, size=2000, **given)
    bad = simulate("baoab", curvature=1.0, draws=200, size=20, seed=1, **given)
    bad = (2 * bad[0], 2 * bad[1], bad[2])
    table = d.temperature_table(tree_of({"w0": good, "nn.w1": bad}, **given))
    found = verdicts(table)
    at = "at its temperature"
    assert found["configurational", "all"] == found["configurational", "w0"] == at
    assert found["kinetic", "all"] == at
    # Of 20 coordinates less is known; that is no fault.
    assert re.fullmatch(r"cannot tell: [+-]\d+% with an error of \d+%; take more draws", found["kinetic", "nn.w1"])
    assert re.match(
        r"out of equilibrium while the whole is at its temperature: too hot by \d+%", found["configurational", "nn.w1"]
    )
    lower = table.set_index(["quantity", "part"]).lower
    assert lower["kinetic", "nn.w1"] == pytest.approx(d.temperature_band(20)[0])
    assert lower["kinetic", "all"] == pytest.approx(d.temperature_band(2020)[0])


def test_masses_by_site():
    given = {"step_size": 0.1, "friction": 1.0}
    masses = {"nn/w0": 1.0, "w1": 0.2}
    chains = {
        "nn.w0": simulate("symplectic_euler", curvature=1.0, draws=300, size=300, mass=1.0, **given),
        "w1": simulate("symplectic_euler", curvature=0.1, draws=300, burn=2000, size=900, mass=0.2, seed=1, **given),
    }
    tree = tree_of(chains, mass={"nn.w0": 1.0, "w1": 0.2}, integrator="symplectic_euler", **given)
    tree["sample_stats"].attrs["mass"] = str(masses).replace("'", '"')
    table = d.temperature_table(tree).set_index(["quantity", "part"])
    expected = np.array([1 / 0.95, 1 / 0.75])
    assert table.expected["kinetic", "nn.w0"] == pytest.approx(expected[0])
    assert table.expected["kinetic", "w1"] == pytest.approx(expected[1])
    assert table.expected["kinetic", "all"] == pytest.approx((300 * expected[0] + 900 * expected[1]) / 1200)
    assert table.verdict["kinetic", "all"] == table.verdict["kinetic", "w1"] == "at its temperature"
    assert table.lower["kinetic", "all"] == pytest.approx(
        table.expected["kinetic", "all"] * d.temperature_band(1200)[0]
    )


def test_phases_at_temperature_0():
    """Exploration at T = 0, then sampling: the first goes to 0, and is not mixed with the second."""
    given = {"step_size": 0.1, "friction": 2.0, "curvature": 1.0}
    still = simulate("baoab", temperature=0.0, start=5.0, burn=300, draws=50, **given)
    warm = simulate("baoab", temperature=0.5, draws=200, **given)
    chain = tuple(np.concatenate(parts, axis=1) for parts in zip(still, warm, strict=True))
    temperature = np.repeat([0.0, 0.5], [50, 200])[None]
    tree = tree_of({"w": chain}, temperature=temperature, step_size=0.1, friction=2.0)
    table = d.temperature_table(tree)
    assert table.draws.tolist() == [200, 200, 50, 50]
    assert set(table.verdict[:2]) == {"at its temperature"}
    assert table.expected.tolist() == [0.5, 0.5, 0, 0]
    assert (table["mean"][2:] < 1e-9).all()
    assert set(table.verdict[2:]) == {"T = 0, an optimiser: goes to 0 as the chain comes to rest"}


def test_a_refresh_at_another_scale():
    given = {"step_size": 0.1, "friction": 0.1, "resample_every": 10, "resample_scale": 0.2}
    chains = {"w": simulate("baoab", curvature=1.0, draws=200, burn=2000, **given)}
    found = d.temperature_table(tree_of(chains, **given)).set_index("quantity").verdict
    assert re.match(r"too cold by \d+%: resample_scale=0.2 is another temperature", found["configurational"])


def test_few_draws_and_large_errors():
    chains = {"w": simulate("baoab", step_size=0.1, curvature=1.0, draws=6, size=3)}
    assert set(d.temperature_table(tree_of(chains)).verdict) == {"too few draws to tell"}
    chains = {"w": simulate("baoab", step_size=0.1, curvature=1.0, draws=100, size=3)}
    assert d.temperature_table(tree_of(chains)).verdict[1].startswith("cannot tell: ")


def test_sgld_has_no_momentum():
    rng = np.random.default_rng(0)
    z, kept = rng.normal(size=500), []
    for _ in range(300):
        z = updates.sgld(z, z + 3 * rng.normal(size=500), rng.normal(size=500), step_size=0.3, noise_scale=0.6**0.5)
        kept.append(z)
    chain = np.array(kept)[None]
    statistics = d.site_temperatures({"w": chain}, {"w": chain})[["configurational_temperature"]]
    statistics["temperature"] = xr.ones_like(statistics["configurational_temperature"])
    statistics["step_size"] = 0.3 * statistics["temperature"]
    statistics.attrs["kernel"] = "SGLD"
    table = d.temperature_table({"sample_stats": statistics})
    assert table.quantity.tolist() == ["configurational"]
    assert re.match(r"too hot by \d+%: lower step_size or take larger batches", table.verdict[0])


# Bad input


def changed(**settings):
    chains = {"w": simulate("baoab", step_size=0.1, curvature=1.0, draws=20, size=3)}
    tree = tree_of(chains)
    for name, value in settings.items():
        if value is None:
            tree["sample_stats"].attrs.pop(name, None)
        else:
            tree["sample_stats"][name][:] = value
    return tree


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: d.temperature_table({}), "tree has no group 'sample_stats': give what bnn_ppl.to_arviz returns"),
        (lambda: d.temperature_table({"sample_stats": xr.Dataset()}), "sample_stats has no 'temperature'"),
        (lambda: d.temperature_table(changed(integrator=None)), "sample_stats has no attribute 'integrator'"),
        (
            lambda: d.temperature_table(changed(kinetic_temperature=np.nan)),
            "sample_stats kinetic_temperature (all) has 20 NaN or infinite values",
        ),
        (lambda: d.temperature_table(changed(), tolerance=-1), "tolerance must be at least 0, got -1"),
        (lambda: d.temperature_table(changed(), level=2), "level must be between 0 and 1, got 2"),
        (lambda: d.temperature_table(changed(), curvature=500.0), "integrator='baoab' is unstable with step_size=0.1"),
        (lambda: d.expected_kinetic_temperature("euler", step_size=0.1), "integrator must be one of 'baoab', 'symp"),
        (
            lambda: d.expected_configurational_temperature("euler", step_size=0.5, curvature=4.0),
            "integrator='euler' is unstable with step_size=0.5",
        ),
        (
            lambda: d.expected_kinetic_temperature("symplectic_euler", step_size=1.0, friction=2.5),
            "is unstable with step_size=1 at friction=2.5",
        ),
        (lambda: d.batch_means_error([1.0, 2.0]), "values must have the shape (chain, draw), got (2,)"),
        (lambda: d.site_temperatures({"a": [[1.0]]}, {"b": [[1.0]]}), "arrays for the same sites, got ['a'] and ['b']"),
        (lambda: d.site_temperatures({"a": [[1.0]]}, {"a": [[1.0, 2.0]]}), "site 'a' must have one shape"),
        (lambda: d.site_temperatures({"a": [[1.0]]}, {"a": [[np.nan]]}), "site 'a' has 1 NaN or infinite values"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
