"""Cases, exact answers and checks for what is adapted in the warm-up: PSGLD's preconditioner, SGHMC's masses."""

import numpy as np

from tests import cases, laws

TEMPERATURES = (1.0, 0.1)
INTEGRATORS = ("baoab", "symplectic_euler")
KINDS = ("adapt", "adapt_coordinates")

# ---- stationary laws, given the preconditioner or the masses: two sites of three curvatures each

SETTLED = 20  # draws after the warm-up in which positions forget what they had to do with it
PSGLD = {"step_size": 0.1, "damping": 0.5, "steps_per_draw": 10}
PSGLD_WARMUP, PSGLD_DRAWS = 40, 150
CURVATURES = {"soft": (1.0, 4.0, 9.0), "stiff": (25.0, 100.0, 225.0)}
SGHMC = {"step_size": 0.12, "friction": 1.0, "temperature": 0.1, "steps_per_draw": 15}
SGHMC_WARMUP, SGHMC_DRAWS = {"adapt": 40, "adapt_coordinates": 200}, 150


def precisions(units=600) -> dict[str, np.ndarray]:
    """Curvature of each coordinate, `units` of each value."""
    return {site: np.repeat(curvatures, units) for site, curvatures in CURVATURES.items()}


def preconditioner(second_moment, weight, damping):
    """G of each coordinate."""
    return 1 / (damping + np.sqrt(second_moment / weight))


def psgld_scores(theta, G, temperature) -> dict:
    """Scores of positions, shape (draws, units) by site, under the law of SGLD with the step h G."""
    scores = {}
    for site, k in precisions().items():
        variance = temperature / (k * (1 - PSGLD["step_size"] * G[site] * k / 2))
        standard = theta[site][SETTLED:] / np.sqrt(variance)
        for curvature in np.unique(k):
            x = standard[:, k == curvature]
            scores |= {(site, curvature): laws.z_over_units(x, 0.0), (site, curvature, 2): laws.z_over_units(x**2, 1.0)}
    return scores


def mass_scores(theta, r, mass, integrator) -> dict:
    """Scores of positions and momenta, with a mass of each coordinate and one friction rate (METHODS, table A)."""
    h, a, T = SGHMC["step_size"], SGHMC["step_size"] * SGHMC["friction"], SGHMC["temperature"]
    scores = {}
    for site, k in precisions().items():
        M = np.broadcast_to(mass[site], k.shape)
        s = h**2 * k / M
        assert s.max() < 3
        of_theta, of_r = 1.0, np.ones_like(s)
        if integrator == "symplectic_euler":
            of_theta, of_r = 1 / (1 - s / (2 * (2 - a))), 1 / (1 - a / 2 - s / 4)
        x, p = theta[site][SETTLED:], r[site][SETTLED:]
        for curvature in np.unique(k):
            here = k == curvature
            moments = {
                "theta": (x / np.sqrt(T / k), 0.0),
                "r": (p / np.sqrt(M * T), 0.0),
                "theta theta": (x**2 * k / (T * of_theta), 1.0),
                "r r": (p**2 / (M * T * of_r), 1.0),
                "theta r": (x * p / (0.5 * h * T * of_r), 1.0),
            }
            for name, (values, expected) in moments.items():
                scores[site, curvature, name] = laws.z_over_units(values[:, here], expected)
    return scores


def assert_masses_follow_gradients(mass, integrator, kind) -> None:
    """Masses are as root mean square gradients, sqrt(k^2 Var theta), over the smallest site's or over the mean."""
    k = precisions()
    h, a = SGHMC["step_size"], SGHMC["step_size"] * SGHMC["friction"]
    s = {site: h**2 * k[site] / mass[site] for site in k}
    heat = {site: 1 / (1 - s[site] / (2 * (2 - a))) if integrator == "symplectic_euler" else 1.0 for site in k}
    squares = {site: k[site] * heat[site] for site in k}
    if kind == "adapt":
        assert mass["soft"] == 1
        mean = {site: squares[site].mean() for site in k}
        np.testing.assert_allclose(mass["stiff"], np.sqrt(mean["stiff"] / mean["soft"]), rtol=0.03)
        return
    together = np.concatenate([mass[site] for site in k])
    np.testing.assert_allclose(together.mean(), 1.0, rtol=1e-9)
    share = {site: mass[site] / np.sqrt(squares[site]) for site in k}
    typical = [np.median(share[site][k[site] == c]) for site in k for c in CURVATURES[site]]
    np.testing.assert_allclose(typical, np.mean(typical), rtol=0.1)


# ---- transition law: a warm-up of one step, so that G = 1 / (b + |g|) of the start

TRANSITION = {"step_size": 0.3, "damping": 0.4, "temperature": 0.3}
TRANSITION_UNITS, TRANSITION_DRAWS = 20_000, 3


def psgld_transition_scores(theta) -> dict:
    """Scores of the draws after the warm-up, shape (draws, units) by site."""
    h, T = TRANSITION["step_size"], TRANSITION["temperature"]
    scores = {}
    for site, k in cases.TRANSITION_CURVATURE.items():
        G = 1 / (TRANSITION["damping"] + k * cases.START)
        law = laws.sgld(h * G, k, T=T)
        moments = laws.transition([law] * (1 + TRANSITION_DRAWS), [cases.START, 0.0], np.zeros((2, 2)))
        for draw in range(TRANSITION_DRAWS):
            mean, covariance = moments[1 + draw]
            scores |= cases.moment_scores((site, draw), theta[site][draw], None, covariance, mean)
    return scores


# ---- T = 0, step for step, on U = sum (scale theta)^4 / 4

SCALES = {"a": 0.7, "b": 2.0}
PATH_WARMUP, PATH_DRAWS, PATH_STEPS = 3, 5, 2


def quartic_start() -> dict[str, np.ndarray]:
    """Values by site."""
    return {"a": np.linspace(-1.5, 1.2, 5), "b": np.linspace(0.3, 1.0, 3)}


def quartic_gradient(theta):
    """Gradient by site."""
    return {site: SCALES[site] ** 4 * value**3 for site, value in theta.items()}


PSGLD_PATH = {"step_size": lambda step: 0.1 / (1 + 0.1 * step), "decay": 0.8, "damping": 0.3, "temperature": 0.0}


def psgld_path(freeze: bool) -> list[dict[str, np.ndarray]]:
    """Positions at the draws after the warm-up, with Adam's correction of the average."""
    theta, draws = quartic_start(), []
    v, count, w = dict.fromkeys(theta, 0.0), 0, PSGLD_PATH["decay"]
    for step in range((PATH_WARMUP + PATH_DRAWS) * PATH_STEPS):
        g = quartic_gradient(theta)
        if not freeze or step < PATH_WARMUP * PATH_STEPS:
            count += 1
            v = {site: w * v[site] + (1 - w) * g[site] ** 2 for site in theta}
        h = PSGLD_PATH["step_size"](step)
        for site in theta:
            G = 1 / (PSGLD_PATH["damping"] + np.sqrt(v[site] / (1 - w**count)))
            theta = theta | {site: theta[site] - h * G * g[site]}
        draws.append(theta)
    return draws[PATH_WARMUP * PATH_STEPS + PATH_STEPS - 1 :: PATH_STEPS]


SHORT = {"step_size": 0.1, "friction": 0.5, "temperature": 0.3}
SGHMC_PATH = {"step_size": 0.3, "friction": 0.5, "temperature": 0.0}
DECAYS = {"adapt": 0.99, "adapt_coordinates": 0.999}


def masses(kind, squares, missing):
    """Masses by site from mean squared gradients; `missing` is w^n."""
    if kind == "adapt":
        sigma = {site: np.sqrt(1e-7 + value.mean()) for site, value in squares.items()}
        return {site: value / min(sigma.values()) for site, value in sigma.items()}
    sigma = {site: np.sqrt(1e-7 + np.maximum(v, missing * v.mean())) for site, v in squares.items()}
    mean = np.concatenate(list(sigma.values())).mean()
    return {site: np.maximum(value / mean, 1e-3) for site, value in sigma.items()}


def sghmc_path(integrator, kind) -> list[tuple[dict, dict, dict]]:
    """Positions, momenta and masses at the draws after the warm-up."""
    theta, draws = quartic_start(), []
    h, a = SGHMC_PATH["step_size"], SGHMC_PATH["step_size"] * SGHMC_PATH["friction"]
    r, mass = {site: np.zeros_like(value) for site, value in theta.items()}, dict.fromkeys(theta, 1.0)
    v, count, w = dict.fromkeys(theta, 0.0), 0, DECAYS[kind]
    for step in range((PATH_WARMUP + PATH_DRAWS) * PATH_STEPS):
        g = quartic_gradient(theta)
        if step < PATH_WARMUP * PATH_STEPS:
            count += 1
            v = {site: w * v[site] + (1 - w) * g[site] ** 2 for site in theta}
            if step % PATH_STEPS == 0:
                new = masses(kind, {site: v[site] / (1 - w**count) for site in theta}, w**count)
                r = {site: r[site] * np.sqrt(new[site] / mass[site]) for site in theta}
                mass = new
        if integrator == "baoab":
            kicked = {site: r[site] - h * g[site] for site in r}
            r = {site: np.exp(-a) * kicked[site] for site in r}
            theta = {site: theta[site] + 0.5 * h * (kicked[site] + r[site]) / mass[site] for site in r}
        else:
            r = {site: (1 - a) * r[site] - h * g[site] for site in r}
            theta = {site: theta[site] + h * r[site] / mass[site] for site in r}
        draws.append((theta, r, mass))
    return draws[PATH_WARMUP * PATH_STEPS + PATH_STEPS - 1 :: PATH_STEPS]


# ---- curvatures 1 and 1e4, at a step far beyond the limit h^2 k < 4 of mass 1

STIFF = {"step_size": 0.1, "friction": 1.0, "steps_per_draw": 20}
STIFF_CURVATURE = {"soft": 1.0, "stiff": 1e4}
STIFF_UNITS = {"adapt": {"soft": 500, "stiff": 500}, "adapt_coordinates": {"soft": 2000, "stiff": 20}}
STIFF_WARMUP, STIFF_DRAWS = 150, 100


def stiff_scores(theta) -> dict:
    """Scores of the second moments, shape (draws, units) by site; BAOAB has no bias on a Gaussian."""
    return {site: laws.z_over_units(k * theta[site][SETTLED:] ** 2, 1.0) for site, k in STIFF_CURVATURE.items()}


# ---- a refresh of the momentum, from N(0, T M) at the adapted masses

REFRESH = {"step_size": 1e-6, "friction": 1e-3, "temperature": 0.3, "resample_every": 5, "steps_per_draw": 5}


def refresh_scores(r, mass) -> dict:
    """Scores of momenta, shape (draws, units) by site."""
    scores = {}
    for site, values in r.items():
        standard = values / np.sqrt(REFRESH["temperature"] * np.broadcast_to(mass[site], values.shape[1:]))
        scores |= {site: laws.z_over_units(standard, 0.0), (site, 2): laws.z_over_units(standard**2, 1.0)}
    return scores


# ---- the end of the warm-up in cycles of ten steps, draws after the sixth, eighth and tenth

CYCLE = {"peak": 0.1, "cycle_length": 10, "exploration": 0.5, "draws_per_cycle": 3}
CYCLE_WARMUP, CYCLE_UNTIL = 4, 16


# ---- potentials that are not finite beyond a wall

WALL = 1.2
WALL_DRAWS, WALL_WARMUP = 60, 10


# ---- temperatures in a table, under symplectic Euler

TABLE = {"step_size": 0.15, "friction": 2.0, "temperature": 0.1, "steps_per_draw": 10, "integrator": "symplectic_euler"}
TABLE_UNITS, TABLE_DRAWS = 600, 120


def assert_expected_kinetic(series, curved, mass) -> None:
    """T / (1 - a / 2 - s / 4) by site, without and with a curvature, and the dimension of each part."""
    a, T = TABLE["step_size"] * TABLE["friction"], TABLE["temperature"]
    np.testing.assert_allclose(series["expected_kinetic"], T / (1 - a / 2), rtol=1e-9)
    sites = list(CURVATURES)
    np.testing.assert_array_equal(series["dimension"], [3 * TABLE_UNITS * len(sites), *[3 * TABLE_UNITS] * len(sites)])
    for site in sites:
        s = TABLE["step_size"] ** 2 * 5.0 / mass[site]
        np.testing.assert_allclose(curved["expected_kinetic"].sel(part=site), T / (1 - a / 2 - s / 4), rtol=1e-6)


# ---- what a user gets wrong

BAD_PSGLD = [
    ({"decay": 1.0}, r"decay must be in \[0, 1\).*, got 1.0"),
    ({"decay": -0.1}, "decay must be finite and at least 0, got -0.1"),
    ({"damping": 0.0}, "damping must be finite and greater than 0, got 0.0"),
    ({"damping": "small"}, "damping must be a number, got 'small'"),
    ({"freeze": "yes"}, "freeze must be True or False, got 'yes'"),
    ({"step_size": 0.0}, "step_size must be finite and greater than 0"),
]
BAD_SGHMC = [
    ({"mass": "heavy"}, "mass must be a number, a dict by site name, 'adapt' or 'adapt_coordinates', got 'heavy'"),
    (
        {"mass": "adapt", "gradient_noise_variance": 0.5},
        "gradient_noise_variance=0.5 together with mass='adapt'.* give masses, or leave",
    ),
    (
        {"mass": "adapt", "integrator": "symplectic_euler", "step_size": 1.0, "friction": 2.0},
        r"symplectic_euler.* needs a = step_size \* friction / mass in \(0, 2\), got 2",
    ),
]
NO_WARMUP = "adapts during the warm-up, and there is none: give MCMC num_warmup .* or set "
LEARNING_RATE = {"learning_rate": 0.1, "momentum": 0.9, "num_data": 50}
NORM_ADJUSTING = {
    "boost": 2.0,
    "adjust": 1.0,
    "momentum_scale": 2.0,
    "resample_every": 3,
    "friction": 1.0,
    "step_size": 0.1,
}
