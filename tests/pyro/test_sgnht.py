"""SGNHT in Pyro's MCMC against its stationary law; mirrors tests/numpyro/test_sgnht.py."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC

from bnn_ppl.pyro import SGNHT
from tests import cases, thermostats

ZERO, ONE = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)


def run(kernel, *args, draws, warmup=0, start=None, seed=0):
    """Positions and momenta by site and statistics, shapes (draws, ...)."""
    pyro.set_rng_seed(seed)
    momenta = []

    def keep(kernel, params, stage, i):
        if stage.startswith("Sample"):
            momenta.append(kernel._unflatten(kernel.state_dict()["chains"][0]["extra"]["momentum"]))

    mcmc = MCMC(
        kernel, num_samples=draws, warmup_steps=warmup, initial_params=start, hook_fn=keep, disable_progbar=True
    )
    mcmc.run(*args)
    theta = {name: value.numpy() for name, value in mcmc.get_samples().items()}
    r = {n: np.stack([m[n] for m in momenta]) for n in theta}
    return theta, r, {n: v.numpy() for n, v in mcmc._diagnostics[0].items() if torch.is_tensor(v)}


def model(y, subsample_size=None):
    theta = {n: pyro.sample(n, dist.Normal(ZERO, ONE).expand([v.shape[1]]).to_event(1)) for n, v in y.items()}
    size = len(next(iter(y.values())))
    with pyro.plate("data", size, subsample_size=subsample_size) as rows:
        for n, v in y.items():
            pyro.sample(f"y_{n}", dist.Normal(theta[n], size**0.5).to_event(1), obs=v[rows])


def offset_data(variance):
    return {n: torch.tensor(v) for n, v in cases.offset_data(variance).items()}


@pytest.mark.parametrize("case", thermostats.NOISES)
def test_stationary_law(case):
    """Gradient noise moves the thermostat, not the momenta's temperature."""
    variance = thermostats.NOISES[case]
    data = offset_data(dict.fromkeys("ab", variance))
    if not variance:
        data = {n: v[:1] for n, v in data.items()}  # zeros, of which one row says as much
    kernel = SGNHT(model, subsampling="with_replacement", steps_per_draw=thermostats.STEPS, **thermostats.ARGUMENTS)
    rows = cases.BATCH if variance else None
    found = run(kernel, data, rows, draws=thermostats.DRAWS, warmup=20)
    cases.assert_scores(thermostats.scores(*found, cases.OFFSET_CURVATURE, variance))
    assert not found[2]["diverging"].any()


def test_spread_of_the_thermostat():
    def few():
        pyro.sample("x", dist.Normal(ZERO, ONE).expand([12]).to_event(1))

    kernel = SGNHT(few, steps_per_draw=2, jit_compile=True, **thermostats.ARGUMENTS)
    thermostats.assert_thermostat(run(kernel, draws=8_000, warmup=100)[2]["thermostat"], 12)


def test_compiled_draws_and_a_resumed_run():
    data = offset_data({"a": 1.0, "b": 1.0})

    def make(**arguments):
        schedule = {"temperature": lambda step: 0.5 + 0.01 * step}
        return SGNHT(model, steps_per_draw=2, step_size=0.1, friction=1.0, **schedule, **arguments)

    whole = run(make(), data, 32, draws=8)
    compiled = run(make(jit_compile=True), data, 32, draws=8)
    first, second = make(), make()
    halves = [run(first, data, 32, draws=3)]
    second.load_state_dict(first.state_dict())
    halves.append(run(second, data, 32, draws=5, seed=99))
    for a, b, c, d in zip(whole, compiled, *halves, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-8)
            np.testing.assert_array_equal(a[name], np.concatenate([c[name], d[name]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0 for SGNHT"),
        ({"friction": 0.0}, "friction must be finite and greater than 0, got 0"),
        ({"step_size": -1.0}, "step_size must be finite and greater than 0, got -1"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        SGNHT(model, **({"step_size": 0.1, "friction": 1.0} | arguments))


@pytest.mark.filterwarnings("ignore:the chain was not finite")
def test_a_chain_that_is_not_finite_starts_anew():
    def potential(z):
        return torch.where(z["x"] > 0.5, torch.nan, -z["x"]).sum()

    kernel = SGNHT(potential_fn=potential, step_size=0.5, friction=1.0)
    theta, _, statistics = run(kernel, draws=20, start={"x": torch.zeros(1)})
    assert statistics["diverging"].any()
    assert np.isfinite(theta["x"]).all()
    assert np.isfinite(statistics["thermostat"]).all()
