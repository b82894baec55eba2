"""Cycles of step size and temperature: a small one with its exact law, shared by the tests of both backends."""

import numpy as np

from bnn_ppl.schedules import Cyclical
from tests import cases, laws

CYCLE = Cyclical(peak=0.4, cycle_length=7, exploration=0.4, draws_per_cycle=2, explore_temperature=0.05)
ENDS = (5, 7)  # draws fall after so many gradient steps of a cycle; the first 3 explore
TEMPERATURE = 0.3
WARMUP, DRAWS = 2, 4
UNITS = 20_000


def arguments(scheme: str) -> dict:
    """Arguments of a kernel."""
    common = {"step_size": CYCLE, "temperature": TEMPERATURE}
    return common if scheme in laws.OVERDAMPED else common | {"friction": 2.0, "mass": cases.MASS}


def scores(scheme: str, theta, r) -> dict:
    """Scores of the draws after the warm-up, shape (DRAWS, UNITS) by site."""
    found = {}
    for site, k in cases.TRANSITION_CURVATURE.items():
        steps = []
        for step in range(21):
            within = step % 7
            now = {"step_size": 0.2 * (np.cos(np.pi * within / 7) + 1), "temperature": 0.05 if within < 3 else 0.3}
            steps.append(cases.law(scheme, k, arguments(scheme) | now, site))
        start = np.diag([0.0, {"sgld": 0.0, "lm": 1.0}.get(scheme, 0.05 * cases.MASS[site])])
        moments = laws.transition(steps, [cases.START, 0.0], start)
        for draw in range(DRAWS):
            cycle, which = divmod(draw + WARMUP, 2)
            mean, covariance = moments[7 * cycle + ENDS[which] - 1]
            momentum = None if r is None else r[site][draw]
            found |= cases.moment_scores((site, draw), theta[site][draw], momentum, covariance, mean)
    return found


def assert_statistics(statistics) -> None:
    """Cycle, step size and temperature of the draws are those of their last gradient steps."""
    np.testing.assert_array_equal(statistics["cycle"], [1, 1, 2, 2])
    np.testing.assert_allclose(statistics["step_size"], [CYCLE(4), CYCLE(6)] * 2, rtol=1e-12)
    np.testing.assert_allclose(statistics["temperature"], TEMPERATURE, rtol=1e-12)
