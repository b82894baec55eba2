"""Schedules of the gradient step: published values, shapes, and the same numbers on Python's and JAX's integers."""

import math

import jax
import numpy as np
import optax
import pytest
import torch

from bnn_ppl.schedules import CosineRestarts, Cyclical, LinearRamp, PolynomialDecay, Triangular, scrambled

SCHEDULES = [
    Cyclical(0.5, 25),
    CosineRestarts(2.0, 9, floor=0.5),
    PolynomialDecay(0.043, 1.0, 0.55),
    LinearRamp(0.0, 1.0, 10, begin=5),
    LinearRamp(1.0, 0.2, 3),
    Triangular(0.05, 0.01, 8, begin=5),
    Triangular(0.5, 0.1, 2),
]


def test_published_values():
    """Zhang et al. (2020) count their steps from 1; alpha_0 = .5, K = 100 steps in M = 4 cycles."""
    schedule = Cyclical(peak=0.5, cycle_length=math.ceil(100 / 4))
    published = {
        1: 0.5,
        2: 0.4980286753,
        7: 0.4322421569,
        13: 0.2656976299,
        19: 0.0906440026,
        25: 0.0019713247,
        26: 0.5,
    }
    for k, value in published.items():
        assert schedule(k - 1) == pytest.approx(value, abs=5e-11)


def test_values():
    restarts = CosineRestarts(2.0, 10, floor=0.5)
    assert [restarts(k) for k in (0, 5, 10, 15)] == pytest.approx([2.0, 1.25, 2.0, 1.25])
    ramp = LinearRamp(0.0, 2.0, 10, begin=5)
    assert [ramp(k) for k in (0, 5, 10, 15, 99)] == pytest.approx([0, 0, 1, 2, 2])
    decay = PolynomialDecay(0.1, 2.0, 0.5)
    assert [decay(k) for k in (0, 2, 7)] == pytest.approx([0.1 / 2**0.5, 0.05, 0.1 / 3])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_traced_steps_have_the_values_of_python_integers(schedule):
    with jax.enable_x64(True):
        traced = jax.jit(jax.vmap(schedule))(np.arange(60))
    np.testing.assert_allclose(traced, [schedule(k) for k in range(60)], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("cycle", "first", "ends"),
    [
        (Cyclical(1.0, 50, exploration=0.9, draws_per_cycle=3), 45, (46, 48, 50)),
        (Cyclical(1.0, 10, exploration=0.7), 7, (10,)),
        (Cyclical(1.0, 10, exploration=0.65, draws_per_cycle=3), 7, (8, 9, 10)),
        (Cyclical(1.0, 4, exploration=0.0, draws_per_cycle=4), 0, (1, 2, 3, 4)),
        (Cyclical(1.0, 1), 0, (1,)),
    ],
)
def test_where_draws_fall(cycle, first, ends):
    """The last draw is at the end of the cycle, and all lie in the sampling phase."""
    length = cycle.cycle_length
    assert [cycle.temperature(k, 1.0) for k in range(length)] == [0.0] * first + [1.0] * (length - first)
    assert cycle.draw_ends == ends
    found, step = [], 0
    while step < 3 * length:
        step += cycle.steps_to_draw(step)
        found.append(step)
    assert found == [length * c + end for c in range(3) for end in ends]
    traced = jax.jit(jax.vmap(cycle.steps_to_draw))(np.arange(2 * length))
    np.testing.assert_array_equal(traced, [cycle.steps_to_draw(k) for k in range(2 * length)])
    hot = jax.jit(jax.vmap(lambda k: cycle.temperature(k, 1.0)))(np.arange(length))
    np.testing.assert_array_equal(hot, [cycle.temperature(k, 1.0) for k in range(length)])


def test_scrambled_steps_are_uniform_and_the_same_for_both_backends():
    numbers = np.array([scrambled(k) for k in range(20_000)])
    np.testing.assert_array_equal(jax.jit(jax.vmap(scrambled))(np.arange(20_000)), numbers)
    counts = np.histogram(numbers, bins=50, range=(0, 2**32))[0]
    assert abs(((counts - 400) ** 2 / 400).sum() - 49) < 4 * np.sqrt(2 * 49)
    refreshed = numbers < 2**32 / 10
    assert abs(np.mean(refreshed[1:] & refreshed[:-1]) - 0.01) < 4 * np.sqrt(0.01 / 20_000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cyclical(0.0, 10), "peak must be finite and greater than 0, got 0"),
        (lambda: Cyclical(lambda k: 1.0, 10), "peak must be a number"),
        (lambda: Cyclical(1.0, 2.5), "cycle_length must be an integer of at least 1, got 2.5"),
        (lambda: Cyclical(1.0, 10, exploration=1.0), r"exploration must be a number in \[0, 1\).*got 1.0"),
        (lambda: Cyclical(1.0, 10, exploration=-0.1), r"exploration must be a number in \[0, 1\).*got -0.1"),
        (lambda: Cyclical(1.0, 3, draws_per_cycle=4), "cycle_length=3 is shorter than its draws_per_cycle=4"),
        (lambda: Cyclical(1.0, 10, exploration=0.8, draws_per_cycle=3), "draws_per_cycle=3 is more than .* steps, 2 "),
        (lambda: Cyclical(1.0, 10, draws_per_cycle=0), "draws_per_cycle must be an integer of at least 1, got 0"),
        (lambda: Cyclical(1.0, 10, explore_temperature=-1.0), "explore_temperature must be finite and at least 0"),
        (lambda: CosineRestarts(1.0, 0), "cycle_length must be an integer of at least 1, got 0"),
        (lambda: CosineRestarts(-1.0, 5), "peak must be finite and at least 0, got -1"),
        (lambda: PolynomialDecay(1.0, 0.0), "b must be finite and greater than 0, got 0"),
        (lambda: LinearRamp(0.0, math.nan, 5), "end must be finite and at least 0, got nan"),
        (lambda: LinearRamp(0.0, 1.0, 5, begin=-1), "begin must be an integer of at least 0, got -1"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_triangular():
    """Garipov et al. (2018): with the share x of a cycle, a1 (1 - 2 x) + 2 x a2, then a1 (2 x - 1) + a2 (2 - 2 x)."""
    peak, floor, length, begin = 0.05, 0.01, 10, 7
    schedule = Triangular(peak, floor, length, begin)
    assert [schedule(k) for k in range(begin)] == [peak] * begin
    for k in range(3 * length):
        x = (k % length) / length
        expected = peak * (1 - 2 * x) + 2 * x * floor if x < 0.5 else peak * (2 * x - 1) + floor * (2 - 2 * x)
        assert schedule(begin + k) == pytest.approx(expected, rel=1e-12)
    assert [k for k in range(40) if schedule(k) == pytest.approx(floor, rel=1e-9)] == [12, 22, 32]
    assert Triangular(0.0, 0.5, 2)(1) == 0.5


def test_triangular_in_optimisers():
    """Of optax, in a compiled step, and of torch."""
    schedule = Triangular(0.05, 0.01, 4, begin=2)
    expected = [schedule(k) for k in range(9)]
    optimiser = optax.sgd(schedule)
    update, state = jax.jit(optimiser.update), optimiser.init(np.zeros(1))
    found = []
    for _ in range(9):
        moved, state = update(np.ones(1), state)
        found.append(-float(moved[0]))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule)
    found = []
    for _ in range(9):
        found += scheduler.get_last_lr()
        optimiser.step()
        scheduler.step()
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"peak": -1.0}, r"peak must be finite and at least 0, got -1\.0"),
        ({"floor": float("nan")}, "floor must be finite and at least 0, got nan"),
        ({"floor": abs}, "floor must be a number, got <built-in function abs>"),
        ({"cycle_length": 0}, "cycle_length must be an integer of at least 1, got 0"),
        ({"cycle_length": 7}, "cycle_length must be even, so that a cycle has a middle, got 7"),
        ({"begin": -1}, "begin must be an integer of at least 0, got -1"),
        ({"begin": True}, "begin must be an integer of at least 0, got True"),
    ],
)
def test_bad_triangles(arguments, message):
    with pytest.raises(ValueError, match=message):
        Triangular(**{"peak": 1.0, "floor": 0.1, "cycle_length": 4} | arguments)
