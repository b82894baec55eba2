"""PSGLD in Pyro's MCMC against exact laws; mirrors tests/numpyro/test_psgld.py."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC

from bnn_ppl.pyro import PSGLD
from bnn_ppl.schedules import Cyclical
from tests import adapted, cases

ZERO, ONE = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_thread():
    """On busy cores the threads of small operations wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(kernel, *args, draws, warmup=0, start=None, seed=0, state=None, hook=None):
    """Run the host's MCMC: positions and average by site, shape (draws, units), and statistics, shape (draws,)."""
    pyro.set_rng_seed(seed)
    averages = []

    def keep(kernel, params, stage, i):
        if hook is not None:
            hook(kernel, stage, i)
        if stage.startswith("Sample"):
            averages.append(kernel._unflatten(kernel.state_dict()["chains"][0]["extra"]["second_moment"]))

    if state is not None:
        kernel.load_state_dict(state)
    mcmc = MCMC(
        kernel, num_samples=draws, warmup_steps=warmup, initial_params=start, hook_fn=keep, disable_progbar=True
    )
    mcmc.run(*args)
    theta = {name: value.numpy() for name, value in mcmc.get_samples().items()}
    average = {name: np.stack([v[name].numpy() for v in averages]) for name in theta}
    statistics = {name: value.numpy() for name, value in mcmc._diagnostics[0].items() if torch.is_tensor(value)}
    return theta, average, statistics


def extra_of(kernel):
    return kernel.state_dict()["chains"][0]["extra"]


def same(a, b, rtol=0.0):
    for x, y in zip(a, b, strict=True):
        assert set(x) == set(y)
        for name in x:
            np.testing.assert_allclose(x[name], y[name], rtol=rtol)


def gaussian():
    for site, k in adapted.precisions().items():
        pyro.sample(site, dist.Normal(ZERO, torch.tensor(k**-0.5)).to_event(1))


@pytest.mark.parametrize("temperature", adapted.TEMPERATURES)
def test_stationary_law_given_the_preconditioner(temperature):
    kernel = PSGLD(gaussian, temperature=temperature, **adapted.PSGLD)
    theta, average, statistics = run(kernel, draws=adapted.PSGLD_DRAWS, warmup=adapted.PSGLD_WARMUP)
    for values in average.values():
        np.testing.assert_array_equal(values, np.broadcast_to(values[0], values.shape))
    weight = float(extra_of(kernel)["weight"])
    assert weight == pytest.approx(1 - 0.99 ** (adapted.PSGLD_WARMUP * adapted.PSGLD["steps_per_draw"]))
    G = {site: adapted.preconditioner(v[0], weight, adapted.PSGLD["damping"]) for site, v in average.items()}
    cases.assert_scores(adapted.psgld_scores(theta, G, temperature))
    assert not statistics["diverging"].any()
    np.testing.assert_array_equal(statistics["temperature"], temperature)


def test_transition_law():
    def model():
        for site, k in cases.TRANSITION_CURVATURE.items():
            pyro.sample(site, dist.Normal(ZERO, k**-0.5 * ONE).expand([adapted.TRANSITION_UNITS]).to_event(1))

    start = {site: torch.full((adapted.TRANSITION_UNITS,), cases.START) * ONE for site in cases.TRANSITION_CURVATURE}
    theta, _, _ = run(PSGLD(model, **adapted.TRANSITION), draws=adapted.TRANSITION_DRAWS, warmup=1, start=start)
    cases.assert_scores(adapted.psgld_transition_scores(theta))


def quartic(z):
    return sum(((adapted.SCALES[site] * value) ** 4).sum() for site, value in z.items()) / 4


@pytest.mark.parametrize("freeze", [True, False])
def test_zero_temperature_step_for_step(freeze):
    kernel = PSGLD(potential_fn=quartic, freeze=freeze, steps_per_draw=adapted.PATH_STEPS, **adapted.PSGLD_PATH)
    start = {site: torch.tensor(value) for site, value in adapted.quartic_start().items()}
    theta, average, _ = run(kernel, draws=adapted.PATH_DRAWS, warmup=adapted.PATH_WARMUP, start=start)
    for draw, expected in enumerate(adapted.psgld_path(freeze)):
        for site, value in expected.items():
            np.testing.assert_allclose(theta[site][draw], value, rtol=1e-10)
    frozen = [np.all(values == values[0]) for values in average.values()]
    assert frozen == [freeze] * len(average)


def streamed(**arguments):
    """A kernel with minibatches that straddle epochs, on data of 10 rows."""

    def model(y):
        theta = pyro.sample("theta", dist.Normal(ZERO, ONE).expand([3]).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(ONE))
        with pyro.plate("data", cases.COUNT_ROWS, subsample_size=cases.COUNT_BATCH) as rows:
            pyro.sample("y", dist.Normal(theta, scale).to_event(1), obs=y[rows])

    return PSGLD(model, **({"step_size": 0.02, "steps_per_draw": 2, "temperature": 0.7} | arguments))


Y = torch.tensor(np.random.default_rng(2).standard_normal((cases.COUNT_ROWS, 3)) + 1)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_resumed_run_is_the_uninterrupted_run(freeze):
    whole = run(streamed(freeze=freeze), Y, draws=10, warmup=4)
    first = streamed(freeze=freeze)
    halves = [run(first, Y, draws=5, warmup=4)]
    halves.append(run(streamed(freeze=freeze), Y, draws=5, seed=99, state=first.state_dict()))
    same(whole, [{n: np.concatenate([a[n], b[n]]) for n in a} for a, b in zip(*halves, strict=True)])


def test_a_state_from_the_warmup_goes_on_adapting_to_its_end():
    states = []

    def hook(kernel, stage, i):
        if stage == "Warmup" and i == 1:
            states.append(kernel.state_dict())

    whole = run(streamed(), Y, draws=5, warmup=4, hook=hook)
    rest = run(streamed(), Y, draws=7, seed=99, state=states[0])
    same(whole, [{n: values[2:] for n, values in part.items()} for part in rest])
    assert not np.any(rest[1]["theta"][0] == rest[1]["theta"][1])


@pytest.mark.parametrize("freeze", [True, False])
def test_compiled_steps(freeze):
    plain, compiled = (run(streamed(freeze=freeze, jit_compile=jit), Y, draws=5, warmup=4) for jit in (False, True))
    same(plain, compiled, rtol=1e-8)


def test_adaptation_ends_with_the_warmup_in_cycles():
    kernel = streamed(step_size=Cyclical(**adapted.CYCLE), steps_per_draw=1)
    _, average, _ = run(kernel, Y, draws=5, warmup=adapted.CYCLE_WARMUP)
    assert int(extra_of(kernel)["until"]) == adapted.CYCLE_UNTIL
    assert all(np.all(values == values[0]) for values in average.values())


def test_a_chain_that_diverged_keeps_its_average():
    def walled(z):
        return torch.where(z["x"].abs() < adapted.WALL, z["x"] ** 2 / 2, torch.nan).sum()

    kernel = PSGLD(potential_fn=walled, step_size=0.1)
    with pytest.warns(UserWarning, match="the chain was not finite"):
        theta, average, statistics = run(
            kernel, draws=adapted.WALL_DRAWS, warmup=adapted.WALL_WARMUP, start={"x": torch.full((2,), 0.1)}
        )
    assert 0 < statistics["diverging"].sum() < adapted.WALL_DRAWS
    assert np.abs(theta["x"]).max() < adapted.WALL
    assert np.all(average["x"] == average["x"][0])
    assert np.all(average["x"] > 0)


@pytest.mark.parametrize(("options", "message"), adapted.BAD_PSGLD)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        PSGLD(gaussian, **{"step_size": 0.1} | options)


def test_without_a_warmup():
    with pytest.raises(ValueError, match="freeze=True " + adapted.NO_WARMUP + "freeze=False"):
        run(PSGLD(gaussian, step_size=0.1), draws=1)
    run(PSGLD(gaussian, step_size=0.1, freeze=False), draws=1)
