"""SGNHT on Gaussians of many dimensions, where its thermostat hardly moves: cases that both backends share."""

import numpy as np

from tests import cases, laws

ARGUMENTS = {"step_size": 0.1, "friction": 1.0, "temperature": 0.5}
NOISES = {"full data": 0.0, "minibatches": 4.0}
DRAWS, STEPS = 240, 16


def scores(theta, r, statistics, curvature: float, variance: float) -> dict:
    """Scores of the thermostat, the momenta and the positions, shapes (draws,) and (draws, units) by site."""
    h, C, T = ARGUMENTS.values()
    x = laws.thermostat(h, curvature, variance, C=C, T=T)
    covariance = laws.stationary(laws.sgnht(h, curvature, x, C=C, T=T), variance)
    found = {}
    for site in theta:
        found |= cases.moment_scores(site, theta[site], r[site], covariance)
    blocks = statistics["thermostat"].reshape(-1, 20).mean(1)  # of 320 steps
    return found | {"thermostat": laws.z_over_units(blocks, x)}


def assert_thermostat(values: np.ndarray, size: int) -> None:
    """In few dimensions the thermostat is N(C, T / d), up to the square of the step."""
    blocks = values.reshape(40, -1)
    C, T = ARGUMENTS["friction"], ARGUMENTS["temperature"]
    z = {
        "mean": laws.z_over_units(blocks.mean(1), C),
        "variance": laws.z_over_units(((blocks - C) ** 2).mean(1), T / size),
    }
    cases.assert_scores(z)
    assert blocks.mean(1).std() / 40**0.5 < 0.02 * C  # else the test says little
