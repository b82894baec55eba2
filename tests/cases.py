"""Cases, exact answers and checks that the tests of both backends share, in NumPy.

The tests of a backend run them through the host's MCMC. Units are independent coordinates of one chain, thousands
of them, so that a z-score below 4 is a sharp statement; seeds are fixed.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests import laws

TEMPERATURES = (1.0, 0.1, 0.01)
SUBSAMPLING = ("epoch", "without_replacement", "with_replacement")
MASS = {"heavy": 2.0, "light": 0.5}


def assert_scores(scores: Mapping[Any, float]) -> None:
    """Every z-score is below 4."""
    wrong = {name: round(z, 2) for name, z in scores.items() if not abs(z) < 4}
    assert not wrong, f"{len(wrong)} of {len(scores)} z-scores are not below 4: {wrong}"


def moment_scores(name: Any, theta, r, covariance, mean=(0.0, 0.0), z=laws.z_over_units) -> dict[Any, float]:
    """z-scores of the first and second moments of theta and r, shape (units,) or (draws, units); r may be None."""
    x = {"theta": theta - mean[0]} | ({} if r is None else {"r": r - mean[1]})
    scores = {(name, i): z(values, 0.0) for i, values in x.items()}
    for i, j in itertools.combinations_with_replacement(x, 2):
        scores[name, i, j] = z(x[i] * x[j], covariance[("theta", "r").index(i), ("theta", "r").index(j)])
    return scores


def law(scheme: str, k, arguments: Mapping[str, Any], site: str | None = None, **changes) -> laws.Map:
    """The oracle's step at the arguments of a kernel."""
    numbers = {"T": arguments.get("temperature", 1.0)}
    if scheme in laws.UNDERDAMPED:
        mass = arguments.get("mass", 1.0)
        numbers |= {"C": arguments["friction"], "M": mass[site] if isinstance(mass, Mapping) else mass}
    return laws.SCHEMES[scheme](arguments["step_size"], k, **(numbers | changes))


# ---- stationary laws: two sites of three curvatures each

CURVATURES = (1.0, 4.0, 9.0)
UNITS = 600
STATIONARY_DRAWS = 150
STATIONARY = {
    "sgld": {"step_size": 0.15},
    "lm": {"step_size": 0.15},
    "baoab": {"step_size": 0.3, "friction": 1.0, "mass": MASS},
    "symplectic_euler": {"step_size": 0.3, "friction": 1.0, "mass": MASS},
}


def deviations(curvatures=CURVATURES, units=UNITS) -> np.ndarray:
    """Standard deviations of the Gaussian model, `units` of each curvature."""
    return np.repeat(curvatures, units) ** -0.5


def by_curvature(values: np.ndarray, curvatures=CURVATURES) -> dict[float, np.ndarray]:
    """Coordinates, the last axis, split by curvature."""
    return dict(zip(curvatures, np.split(values, len(curvatures), axis=-1), strict=True))


def stationary_scores(theta, r, covariance, curvatures=CURVATURES) -> dict:
    """Scores of all sites; `covariance(k, site)` is the oracle."""
    scores = {}
    for site in theta:
        momenta = by_curvature(r[site], curvatures) if r else dict.fromkeys(curvatures)
        for k, values in by_curvature(theta[site], curvatures).items():
            scores |= moment_scores((site, k), values, momenta[k], covariance(k, site))
    return scores


def assert_statistics(statistics, theta, r, arguments) -> None:
    """What a draw records is what its position and momentum say, on the Gaussian model of STATIONARY."""
    precision = np.repeat(CURVATURES, UNITS)
    size = sum(x.shape[1] for x in theta.values())
    expected = {
        "temperature": arguments.get("temperature", 1.0),
        "step_size": arguments["step_size"],
        "position_norm_sq": sum((x**2).sum(1) for x in theta.values()),
        "configurational_temperature": sum((precision * x**2).sum(1) for x in theta.values()) / size,
        "gradient_norm": np.sqrt(sum(((precision * x) ** 2).sum(1) for x in theta.values())),
    }
    sites = sorted(theta)
    expected["site_position_norm_sq"] = np.stack([(theta[s] ** 2).sum(1) for s in sites], 1)
    expected["site_gradient_norm"] = np.stack([np.sqrt(((precision * theta[s]) ** 2).sum(1)) for s in sites], 1)
    expected["site_configurational_temperature"] = np.stack([(precision * theta[s] ** 2).mean(1) for s in sites], 1)
    if r:
        expected["site_kinetic_temperature"] = np.stack([(r[s] ** 2).mean(1) / MASS[s] for s in sites], 1)
        expected["kinetic_temperature"] = sum((r[site] ** 2).sum(1) / MASS[site] for site in r) / size
        expected["momentum_norm_sq"] = sum((p**2).sum(1) for p in r.values())
        for name, factor in (("position_momentum", 1.0), ("momentum_gradient", precision)):
            by_site = np.stack([(factor * theta[site] * r[site]).sum(1) for site in sites], 1)
            expected |= {name: by_site.sum(1), f"site_{name}": by_site}
        expected["site_momentum_norm_sq"] = np.stack([(r[site] ** 2).sum(1) for site in sites], 1)
    for name, value in expected.items():
        np.testing.assert_allclose(statistics[name], np.broadcast_to(value, statistics[name].shape), rtol=1e-9)
    assert not np.any(statistics["diverging"])


def temperature_scores(statistics, scheme, arguments) -> dict:
    """Mean kinetic and configurational temperature and theta . r against the exact law of the chain."""
    covariances = {(site, k): laws.stationary(law(scheme, k, arguments, site)) for site in MASS for k in CURVATURES}
    groups = len(covariances)
    expected = {"configurational_temperature": sum(k * S[0, 0] for (_, k), S in covariances.items()) / groups}
    if scheme in laws.UNDERDAMPED:
        expected["kinetic_temperature"] = sum(S[1, 1] / MASS[site] for (site, _), S in covariances.items()) / groups
        expected["position_momentum"] = sum(S[0, 1] for S in covariances.values()) * UNITS
    # Draws are correlated: blocks of 15 draws, 150 steps, are not.
    return {name: laws.z_over_units(statistics[name].reshape(-1, 15).mean(1), e) for name, e in expected.items()}


# ---- transition laws from a fixed start

TRANSITION_UNITS = 20_000
TRANSITION_CURVATURE = {"heavy": 0.7, "light": 2.0}
START = 1.5
REFRESHED = {"refresh": (0, 3), "jitter": (0, 1, 3, 5)}  # gradient steps that begin with a new momentum
DRAWS, STEPS_PER_DRAW = 3, 2


def transition_arguments(case: str, scheme: str, divide=lambda step: 1 / (1 + step)) -> dict[str, Any]:
    """Arguments of a kernel: constant ones, with a refresh, or schedules of the step."""
    arguments: dict[str, Any] = {"step_size": 0.4, "temperature": 0.3}
    if scheme in laws.UNDERDAMPED:
        arguments |= {"friction": 0.8, "mass": MASS}
    if case == "refresh":
        arguments |= {"resample_every": 3, "resample_scale": 0.6}
    if case == "jitter":
        arguments |= {"resample_every": 2, "resample_scale": 0.6, "resample_jitter": True}
    if case == "schedule":
        arguments |= {"step_size": lambda step: 0.2 + 0.3 * divide(step), "temperature": divide}
    return arguments


TRANSITIONS = [
    *(("constant", scheme) for scheme in laws.SCHEMES),
    *((case, scheme) for scheme in laws.UNDERDAMPED for case in REFRESHED),
    *(("schedule", scheme) for scheme in laws.SCHEMES),
]


def transition_scores(case: str, scheme: str, theta, r) -> dict:
    """Scores of the draws of shape (DRAWS, TRANSITION_UNITS) by site; the first momentum is from N(0, T M)."""
    arguments = transition_arguments(case, scheme)
    scores, centred = {}, {}
    for site, k in TRANSITION_CURVATURE.items():
        steps = []
        for step in range(DRAWS * STEPS_PER_DRAW):
            now = {n: v(step) if n in ("step_size", "temperature") and callable(v) else v for n, v in arguments.items()}
            if step in REFRESHED.get(case, ()):
                redraw = laws.refresh(0.6, MASS[site])
                steps.append(laws.then(redraw, law(scheme, k, now, site, kick=0.5)))
            else:
                steps.append(law(scheme, k, now, site))
        first = arguments["temperature"](0) if case == "schedule" else arguments["temperature"]
        start = np.diag([0.0, {"sgld": 0.0, "lm": 1.0}.get(scheme, first * MASS[site])])
        moments = laws.transition(steps, [START, 0.0], start)
        for draw in range(DRAWS):
            mean, covariance = moments[(draw + 1) * STEPS_PER_DRAW - 1]
            momentum = None if r is None else r[site][draw]
            scores |= moment_scores((site, draw), theta[site][draw], momentum, covariance, mean)
            centred[site, draw] = theta[site][draw] - mean[0]
    for draw in range(DRAWS):
        heavy, light = centred["heavy", draw], centred["light", draw]
        scores["across sites", draw] = laws.z_over_units(heavy * light, 0.0)
        scores["across coordinates", draw] = laws.z_over_units(light[1:] * light[:-1], 0.0)
    return scores


# ---- gradient noise: y_i ~ N(theta, N) in a subsampled plate, theta ~ N(0, 1), so that U has curvature 2

ROWS, BATCH = 512, 32
BATCHES = ROWS // BATCH
FINITE = (ROWS - BATCH) / (ROWS - 1)
OFFSET_CURVATURE = 2.0
GRADIENT_NOISE = {
    "sgld": {"step_size": 0.1},
    "lm": {"step_size": 0.1},
    "baoab": {"step_size": 0.3, "friction": 1.0, "mass": {"a": 1.0, "b": 2.0}},
    "symplectic_euler": {"step_size": 0.3, "friction": 1.0, "mass": {"a": 1.0, "b": 2.0}},
}
GRADIENT_NOISES = [
    *itertools.product(("sgld", "baoab"), SUBSAMPLING),
    ("symplectic_euler", "epoch"),
    ("lm", "without_replacement"),
]
V = {"a": 20.0, "b": 8.0}
NOISE_DRAWS = 150
COLD_V = {n: {"a": 1.0, "b": 1.0} if n in laws.OVERDAMPED else {"a": 0.4, "b": 0.2} for n in laws.SCHEMES}


def offset_data(variance: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Rows whose minibatch gradient has the given variance, sampled with replacement.

    The columns are orthogonal, else the coordinates, which share their minibatches, would not be independent.
    """
    row, column = np.arange(ROWS)[:, None] + 0.5, np.arange(1, ROWS - 1)
    contrasts = np.sqrt(2) * np.cos(np.pi * row * column / ROWS)
    return {site: np.sqrt(v * BATCH) * contrasts[:, i::2] for i, (site, v) in enumerate(variance.items())}


def gradient_noise_scores(theta, r, scheme, arguments, variance, subsampling, compensated=False) -> dict:
    """Scores at the ends of epochs."""
    scores = {}
    for site, v in variance.items():
        step = law(scheme, OFFSET_CURVATURE, arguments, site, V=v if compensated else 0.0)
        v = v if subsampling == "with_replacement" else v * FINITE
        epoch = subsampling == "epoch"
        covariance = laws.epoch_stream(step, v, BATCHES) if epoch else laws.stationary(step, v)
        scores |= moment_scores(site, theta[site], None if r is None else r[site], covariance)
    return scores


# ---- momentum refresh

REFRESH = {"step_size": 0.3, "friction": 0.2, "mass": MASS, "temperature": 0.7}
REFRESH_CURVATURES = (1.0, 4.0)
REFRESH_DRAWS = 100
REFRESHES = list(itertools.product(laws.UNDERDAMPED, (1, 2, 5, 20)))


def refresh_covariance(integrator: str, L: int):
    """The oracle after the last step before a refresh."""
    h, C, T = (REFRESH[name] for name in ("step_size", "friction", "temperature"))
    return lambda k, site: laws.stationary(laws.refreshed(integrator, h, k, L=L, scale=T, M=MASS[site], C=C, T=T))


NORM_ADJUSTING = {
    "boost": 3.0,
    "adjust": 0.5,
    "momentum_scale": 0.1,
    "friction": 1.0,
    "mass": 0.5,
    "temperature": 0.5,
    "step_size": 0.1,
    "resample_every": 15,
    "steps_per_draw": 15,
}
NORM_ADJUSTING_VALUES = {"baoab": 0.216946, "symplectic_euler": 0.230214}  # 2 Var theta, U = theta^2


# ---- advice on step sizes: a Gaussian of curvatures 4 (site a, 3 coordinates) and 100 (site b, 2), tolerance 0.1


def step_sizes(SGLD, SGHMC, SGNHT) -> list[tuple]:
    """Kernel of a model, largest curvature over mass, and the limits of stability and of bias."""
    share = 0.1 / 1.1
    underdamped = {"step_size": 0.01, "friction": 2.0}
    half, rate = share * 2.0 / 1.9, 2.0 / 1.9  # the mean mass is (3 * 0.5 + 2 * 4) / 5 = 1.9
    euler = [((part**2 + 4 * s * 25) ** 0.5 - part) / 25 for s, part in ((1.0, rate), (share, half))]
    return [
        (lambda model: SGLD(model, step_size=0.01), 100, 0.02, 2 * share / 100),
        (lambda model: SGLD(model, step_size=0.01, integrator="lm"), 100, 0.02, 0.005),
        (lambda model: SGHMC(model, **underdamped), 100, 0.2, 0.005**0.5),
        (lambda model: SGHMC(model, mass={"a": 0.5, "b": 4.0}, **underdamped), 25, 0.4, 0.02**0.5),
        (
            lambda model: SGHMC(model, mass={"a": 0.5, "b": 4.0}, integrator="symplectic_euler", **underdamped),
            25,
            *euler,
        ),
        (lambda model: SGNHT(model, **underdamped), 100, 0.2, 0.005**0.5),
    ]


# ---- gradient noise that was measured, and what it does to the temperature

HOT = {"step_size": 0.3, "friction": 1.0, "subsampling": "with_replacement"}  # slow directions: by 0.3 * 14 / 2
NOT_HOT = ("friction", "thermostat", "another target", "cold")


def assert_noise(statistics: Any, chains: int, batches: int) -> None:
    """Against the variance that the rows were made for; rows are drawn with replacement."""
    assert statistics["gradient_noise"].dims == ("chain", "site")
    assert statistics["gradient_noise"].shape == (chains, len(V))
    assert statistics["site_size"].values.tolist() == [v.shape[1] for v in offset_data(V).values()]
    for site, variance in V.items():
        size = int(statistics["site_size"].sel(site=site))
        error = variance * (2.0 / (size * batches)) ** 0.5  # minibatch means are near normal
        for value in statistics["gradient_noise"].sel(site=site).values:
            assert abs(value - variance) < 5 * error


def not_hot(case: str, SGHMC, SGNHT):
    """A kernel of a model; all but the first would be hot without what the case's name says."""
    kernels = {
        "friction": lambda model: SGHMC(model, **HOT | {"friction": 20.0}),
        "thermostat": lambda model: SGNHT(model, **HOT),
        "another target": lambda model: SGHMC(model, **HOT, temperature=0.1, resample_every=5, resample_scale=1.0),
        "cold": lambda model: SGHMC(model, **HOT, temperature=0.0),
    }
    return kernels[case]


# ---- conjugate linear regression with minibatches

REGRESSION_NOISE = 0.6
REGRESSION_X = np.array([-1.3, -0.6, 0.1, 0.5, 0.9, 1.6])[:, None]
REGRESSION_Y = np.array([-0.9, 0.3, -0.2, 0.8, 0.4, 1.7])
REGRESSION_BATCH = 3
REGRESSION = {
    "sgld": {"step_size": 0.01},
    "lm": {"step_size": 0.01},
    "baoab": {"step_size": 0.05, "friction": 6.0},
    "symplectic_euler": {"step_size": 0.05, "friction": 6.0},
}


def regression_law(scheme: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of (slope, intercept, momenta) where each step takes a fresh subset of the rows."""
    design = np.column_stack([REGRESSION_X, np.ones(len(REGRESSION_X))])
    maps = []
    for rows in itertools.combinations(range(len(design)), REGRESSION_BATCH):
        X, y = design[list(rows)], REGRESSION_Y[list(rows)]
        scale = len(design) / REGRESSION_BATCH / REGRESSION_NOISE**2
        step = law(scheme, scale * X.T @ X + np.eye(2), REGRESSION[scheme])
        maps.append((step, step.b @ (-scale * X.T @ y)))
    return laws.random_batches(maps)


def regression_scores(theta, scheme, posterior_mean, z) -> dict:
    """Scores of draws of shape (draws, units, 2): the mean is the posterior's at any step, the covariance is not."""
    mean, covariance = regression_law(scheme)
    np.testing.assert_allclose(mean[:2], posterior_mean, rtol=1e-10)
    scores = {i: z(theta[..., i], posterior_mean[i]) for i in range(2)}
    centred = theta - posterior_mean
    for i, j in ((0, 0), (0, 1), (1, 1)):
        scores[i, j] = z(centred[..., i] * centred[..., j], covariance[i, j])
    return scores


# ---- T = 0: a small network, its rows and its potential up to constants are the backends' own

NETWORK_NOISE = 0.5
NETWORK_ROWS = 20


def network_data() -> tuple[np.ndarray, np.ndarray]:
    """Inputs (20, 3) and targets (20,)."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((NETWORK_ROWS, 3))
    return x, np.sin(x @ [1.0, -0.5, 0.3]) + 0.1 * rng.standard_normal(NETWORK_ROWS)


def network_start() -> dict[str, np.ndarray]:
    """Weights by site."""
    rng = np.random.default_rng(6)
    return {"b": 0.1 * rng.standard_normal(4), "v": rng.standard_normal(4), "w": rng.standard_normal((3, 4))}


# ---- each index once per epoch, read off a model whose gradient counts the rows

COUNT_ROWS, COUNT_BATCH = 10, 4


def assert_counts(counts: np.ndarray, subsampling: str) -> None:
    """`counts`, shape (steps, rows), has what each minibatch took."""
    assert counts.shape[1] == COUNT_ROWS
    np.testing.assert_array_equal(counts.sum(1), COUNT_BATCH)
    if subsampling == "with_replacement":
        assert counts.max() > 1
        return
    total = counts.cumsum(0)
    if subsampling == "epoch":
        # After n steps every row came floor or ceil of n B / N times: a batch that straddles two epochs may take
        # a row of the old and the same row of the new.
        epochs = np.arange(1, len(counts) + 1)[:, None] * COUNT_BATCH / COUNT_ROWS
        assert np.all((total >= np.floor(epochs)) & (total <= np.ceil(epochs)))
    else:
        assert counts.max() == 1
        assert np.ptp(total[len(total) // 5 * 5 - 1]) > 1  # not an epoch stream
