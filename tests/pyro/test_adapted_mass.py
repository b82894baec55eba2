"""SGHMC with masses that are adapted in the warm-up, in Pyro's MCMC; mirrors tests/numpyro/test_adapted_mass.py."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC

import bnn_ppl
from bnn_ppl.diagnostics import temperature_series, temperature_table
from bnn_ppl.pyro import SGHMC, norm_adjusting_sghmc
from tests import adapted, cases

ZERO, ONE = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_thread():
    """On busy cores the threads of small operations wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(kernel, *args, draws, warmup=0, start=None, seed=0, state=None):
    """Run the host's MCMC, from a state of another run if given; momenta and masses are kept with it."""
    pyro.set_rng_seed(seed)
    kept = []

    def keep(kernel, params, stage, i):
        if stage.startswith("Sample"):
            extra = kernel.state_dict()["chains"][0]["extra"]
            kept.append([kernel._unflatten(extra[name]) if name in extra else {} for name in ("momentum", "mass")])

    if state is not None:
        kernel.load_state_dict(state)
    mcmc = MCMC(
        kernel, num_samples=draws, warmup_steps=warmup, initial_params=start, hook_fn=keep, disable_progbar=True
    )
    mcmc.run(*args)
    mcmc.kept = kept
    return mcmc


def results(mcmc):
    """Positions, momenta and masses by site, shape (draws, ...), and statistics by name."""
    theta = {name: value.numpy() for name, value in mcmc.get_samples().items()}
    momentum, mass = (
        {name: np.stack([draw[i][name].numpy() for draw in mcmc.kept]) for name in mcmc.kept[0][i]} for i in range(2)
    )
    statistics = {name: value.numpy() for name, value in mcmc._diagnostics[0].items() if torch.is_tensor(value)}
    return theta, momentum, mass, statistics


def frozen(mass):
    """The masses, which all draws have; one number where a site has one mass."""
    for values in mass.values():
        np.testing.assert_array_equal(values, np.broadcast_to(values[0], values.shape))
    return {site: v[0].ravel()[0] if np.ptp(v[0]) == 0 else v[0] for site, v in mass.items()}


def same(a, b, rtol=0.0):
    for x, y in zip(a, b, strict=True):
        assert set(x) == set(y)
        for name in x:
            np.testing.assert_allclose(x[name], y[name], rtol=rtol)


def gaussian():
    for site, k in adapted.precisions().items():
        pyro.sample(site, dist.Normal(ZERO, torch.tensor(k**-0.5)).to_event(1))


@pytest.mark.parametrize("kind", adapted.KINDS)
@pytest.mark.parametrize("integrator", adapted.INTEGRATORS)
def test_stationary_law_given_the_masses(integrator, kind):
    kernel = SGHMC(gaussian, mass=kind, integrator=integrator, **adapted.SGHMC)
    mcmc = run(kernel, draws=adapted.SGHMC_DRAWS, warmup=adapted.SGHMC_WARMUP[kind])
    theta, r, mass, statistics = results(mcmc)
    mass = frozen(mass)
    adapted.assert_masses_follow_gradients(mass, integrator, kind)
    cases.assert_scores(adapted.mass_scores(theta, r, mass, integrator))
    kinetic = np.stack([(r[site] ** 2 / mass[site]).mean(1) for site in sorted(r)], 1)
    np.testing.assert_allclose(statistics["site_kinetic_temperature"], kinetic, rtol=1e-9)
    np.testing.assert_allclose(statistics["kinetic_temperature"], kinetic.mean(1), rtol=1e-9)
    assert not statistics["diverging"].any()


def quartic(z):
    return sum(((adapted.SCALES[site] * value) ** 4).sum() for site, value in z.items()) / 4


@pytest.mark.parametrize("kind", adapted.KINDS)
@pytest.mark.parametrize("integrator", adapted.INTEGRATORS)
def test_zero_temperature_step_for_step(integrator, kind):
    """Averages, masses, the rescaling of momenta, friction and the end of the adaptation."""
    kernel = SGHMC(
        potential_fn=quartic,
        mass=kind,
        integrator=integrator,
        steps_per_draw=adapted.PATH_STEPS,
        **adapted.SGHMC_PATH,
    )
    start = {site: torch.tensor(value) for site, value in adapted.quartic_start().items()}
    parts = results(run(kernel, draws=adapted.PATH_DRAWS, warmup=adapted.PATH_WARMUP, start=start))
    for draw, expected in enumerate(adapted.sghmc_path(integrator, kind)):
        for part, values in zip(parts, expected, strict=False):
            for site, value in values.items():
                np.testing.assert_allclose(part[site][draw], np.broadcast_to(value, part[site][draw].shape), rtol=1e-9)


@pytest.mark.parametrize("kind", adapted.KINDS)
def test_a_badly_scaled_gaussian(kind):
    def model():
        for site, k in adapted.STIFF_CURVATURE.items():
            units = adapted.STIFF_UNITS[kind][site]
            pyro.sample(site, dist.Normal(ZERO, k**-0.5 * ONE).expand([units]).to_event(1))

    mcmc = run(SGHMC(model, mass=kind, **adapted.STIFF), draws=adapted.STIFF_DRAWS, warmup=adapted.STIFF_WARMUP)
    theta, _, _, statistics = results(mcmc)
    assert not statistics["diverging"].any()
    cases.assert_scores(adapted.stiff_scores(theta))
    with pytest.warns(UserWarning, match="the chain was not finite"):
        _, _, _, statistics = results(run(SGHMC(model, **adapted.STIFF), draws=30))
    assert statistics["diverging"].any()


@pytest.mark.parametrize("kind", adapted.KINDS)
def test_refresh(kind):
    start = {site: torch.ones(len(k), dtype=torch.float64) for site, k in adapted.precisions().items()}
    _, r, mass, _ = results(run(SGHMC(gaussian, mass=kind, **adapted.REFRESH), draws=20, warmup=2, start=start))
    cases.assert_scores(adapted.refresh_scores(r, frozen(mass)))


def streamed(**arguments):
    """A kernel with minibatches that straddle epochs, on data of 10 rows."""

    def model(y):
        theta = pyro.sample("theta", dist.Normal(ZERO, ONE).expand([3]).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(ONE))
        with pyro.plate("data", cases.COUNT_ROWS, subsample_size=cases.COUNT_BATCH) as rows:
            pyro.sample("y", dist.Normal(theta, scale).to_event(1), obs=y[rows])

    common = {"step_size": 0.05, "friction": 1.0, "steps_per_draw": 2, "temperature": 0.7, "resample_every": 3}
    return SGHMC(model, **(common | arguments))


Y = torch.tensor(np.random.default_rng(2).standard_normal((cases.COUNT_ROWS, 3)) + 1)


@pytest.mark.parametrize("kind", adapted.KINDS)
def test_a_resumed_run_is_the_uninterrupted_run(kind):
    whole = results(run(streamed(mass=kind), Y, draws=10, warmup=4))
    first = streamed(mass=kind)
    halves = [results(run(first, Y, draws=5, warmup=4))]
    halves.append(results(run(streamed(mass=kind), Y, draws=5, seed=99, state=first.state_dict())))
    same(whole, [{n: np.concatenate([a[n], b[n]]) for n in a} for a, b in zip(*halves, strict=True)])


@pytest.mark.parametrize("kind", adapted.KINDS)
def test_compiled_steps(kind):
    plain, compiled = (
        results(run(streamed(mass=kind, jit_compile=jit), Y, draws=5, warmup=4)) for jit in (False, True)
    )
    same(plain, compiled, rtol=1e-8)


def test_a_chain_that_diverged_keeps_its_masses():
    def walled(z):
        x = torch.cat([z["a"], z["b"]])
        return torch.where(x.abs() < adapted.WALL, x**2 / 2, torch.nan).sum()

    kernel = SGHMC(potential_fn=walled, step_size=0.1, friction=1.0, mass="adapt")
    start = {"a": torch.full((1,), 0.1), "b": torch.full((1,), 0.4)}
    with pytest.warns(UserWarning, match="the chain was not finite"):
        mcmc = run(kernel, draws=adapted.WALL_DRAWS, warmup=adapted.WALL_WARMUP, start=start)
    theta, _, mass, statistics = results(mcmc)
    assert 0 < statistics["diverging"].sum() < adapted.WALL_DRAWS
    assert max(np.abs(value).max() for value in theta.values()) < adapted.WALL
    assert max(value for value in frozen(mass).values()) > 1


def test_temperatures_in_a_table():
    mcmc = run(SGHMC(gaussian, mass="adapt", **adapted.TABLE), draws=adapted.TABLE_DRAWS, warmup=60)
    tree = bnn_ppl.to_arviz(mcmc)
    mass = frozen(results(mcmc)[2])
    adapted.assert_expected_kinetic(temperature_series(tree), temperature_series(tree, curvature=5.0), mass)
    table = temperature_table(tree)
    assert set(table["verdict"][(table["quantity"] == "kinetic") & (table["part"] == "soft")]) == {"at its temperature"}


@pytest.mark.parametrize(("options", "message"), adapted.BAD_SGHMC)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SGHMC(gaussian, **{"step_size": 0.1, "friction": 1.0} | options)


@pytest.mark.parametrize("kind", adapted.KINDS)
def test_without_a_warmup(kind):
    with pytest.raises(ValueError, match=f"mass='{kind}' {adapted.NO_WARMUP}mass to a number"):
        run(SGHMC(gaussian, mass=kind, **adapted.SGHMC), draws=1)


@pytest.mark.parametrize("integrator", adapted.INTEGRATORS)
def test_other_ways_to_make_a_kernel(integrator):
    one, kind = (
        SGHMC.from_learning_rate(gaussian, mass=mass, integrator=integrator, **adapted.LEARNING_RATE).settings
        for mass in (1.0, "adapt")
    )
    assert (one.step_size, one.friction, "adapt") == (kind.step_size, kind.friction, kind.mass)
    with pytest.raises(ValueError, match=r"mass must be a number or a dict by site name here, .* got 'adapt'"):
        norm_adjusting_sghmc(gaussian, mass="adapt", integrator=integrator, **adapted.NORM_ADJUSTING)
