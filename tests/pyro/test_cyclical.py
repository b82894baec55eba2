"""Cycles in Pyro's MCMC: draws in the sampling phases, with the exact law; mirrors tests/numpyro/test_cyclical.py."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC

import bnn_ppl
from bnn_ppl.pyro import SGHMC, SGLD
from bnn_ppl.schedules import CosineRestarts, Cyclical
from tests import cases, cycles, laws

ZERO = torch.zeros((), dtype=torch.float64)


def make_kernel(scheme, **arguments):
    if scheme in laws.OVERDAMPED:
        return SGLD(model, integrator="euler" if scheme == "sgld" else scheme, **arguments)
    return SGHMC(model, integrator=scheme, **arguments)


def model(units=cycles.UNITS):
    for site, k in cases.TRANSITION_CURVATURE.items():
        pyro.sample(site, dist.Normal(ZERO, torch.tensor(k**-0.5, dtype=torch.float64)).expand([units]).to_event(1))


def run(kernel, warmup, draws, *args, start=None, seed=0):
    """Finished MCMC, positions and momenta by site, and statistics, shapes (draws, ...)."""
    pyro.set_rng_seed(seed)
    momenta = []

    def keep(kernel, params, stage, i):
        if stage.startswith("Sample") and isinstance(kernel, SGHMC):
            momenta.append(kernel._unflatten(kernel.state_dict()["chains"][0]["extra"]["momentum"]))

    mcmc = MCMC(
        kernel, num_samples=draws, warmup_steps=warmup, initial_params=start, hook_fn=keep, disable_progbar=True
    )
    mcmc.run(*args)
    theta = {name: value.numpy() for name, value in mcmc.get_samples().items()}
    r = {n: np.stack([m[n] for m in momenta]) for n in theta} if momenta else None
    return mcmc, theta, r, {n: v.numpy() for n, v in mcmc._diagnostics[0].items() if torch.is_tensor(v)}


@pytest.mark.parametrize("scheme", laws.SCHEMES)
def test_law_of_the_draws(scheme):
    start = {site: torch.full((cycles.UNITS,), cases.START, dtype=torch.float64) for site in cases.MASS}
    kernel = make_kernel(scheme, **cycles.arguments(scheme))
    _, theta, r, statistics = run(kernel, cycles.WARMUP, cycles.DRAWS, start=start)
    cases.assert_scores(cycles.scores(scheme, theta, r))
    cycles.assert_statistics(statistics)


@pytest.mark.parametrize("scheme", ["lm", "baoab"])
def test_a_resumed_run(scheme):
    _, *whole = run(make_kernel(scheme, **cycles.arguments(scheme)), 0, 9, 5)
    first, second = (make_kernel(scheme, **cycles.arguments(scheme)) for _ in range(2))
    _, *halves = run(first, 0, 4, 5)
    second.load_state_dict(first.state_dict())
    _, *rest = run(second, 0, 5, 5, seed=99)
    for a, b, c in zip(whole, halves, rest, strict=True):
        for name in a or {}:
            np.testing.assert_array_equal(a[name], np.concatenate([b[name], c[name]]))


def test_cycle_is_in_arviz_and_a_cycle_that_is_not_filled_is_told():
    kernel = SGLD(model, step_size=Cyclical(0.1, 10, draws_per_cycle=2))
    tree = bnn_ppl.to_arviz(run(kernel, 2, 4, 3)[0])
    np.testing.assert_array_equal(tree["sample_stats"]["cycle"], [[1, 1, 2, 2]])
    assert "Cyclical" in tree["posterior"].attrs["step_size"]
    with pytest.warns(UserWarning, match="the last cycle has 1 of its 2 draws"):
        bnn_ppl.to_arviz(run(kernel, 2, 3, 3)[0])
    plain = bnn_ppl.to_arviz(run(SGLD(model, step_size=0.1), 2, 3, 3)[0])
    assert "cycle" not in plain["sample_stats"]


def test_a_cyclic_momentum_scale_with_cycles_of_the_step():
    """Without a potential the momenta of a draw are those redrawn in the middle of its cycle, where the scale is 5."""
    scale = CosineRestarts(peak=9.0, cycle_length=8, floor=1.0)
    options = {"step_size": Cyclical(0.05, 8, exploration=0.5), "resample_scale": scale}
    kernel = SGHMC(potential_fn=lambda z: 0.0 * z["x"].sum(), friction=1e-9, resample_every=4, **options)
    statistics = run(kernel, 0, 3, start={"x": torch.zeros(cycles.UNITS)})[-1]
    np.testing.assert_allclose(statistics["kinetic_temperature"], 5.0, rtol=4 * (2 / cycles.UNITS) ** 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps_per_draw": 5}, "steps_per_draw=5 together with step_size=Cyclical"),
        ({"gradient_noise_variance": 1.0}, "gradient_noise_variance=1.0 asks to subtract more noise .* step 0"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(SGLD(model, step_size=Cyclical(0.1, 10), **arguments), 0, 1, 3)
