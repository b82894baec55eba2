"""NumPyro's MCMC with our kernels against the exact laws of the discrete chains; mirrors tests/pyro/test_laws.py."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

from bnn_ppl.models import densities
from bnn_ppl.models.conjugate import linear_regression_posterior
from bnn_ppl.models.numpyro import linear_regression
from bnn_ppl.numpyro import SGHMC, SGLD, norm_adjusting_sghmc
from tests import cases, laws
from tests.numpyro.schemes import make_kernel, results, run


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def gaussian(deviations):
    def model():
        for site in cases.MASS:
            numpyro.sample(site, dist.Normal(0.0, jnp.asarray(deviations)).to_event(1))

    return model


@pytest.mark.parametrize(
    ("scheme", "temperature", "noise"),
    [
        *((scheme, temperature, "normal") for scheme in laws.SCHEMES for temperature in cases.TEMPERATURES),
        *((scheme, 0.1, "fast") for scheme in laws.SCHEMES),
    ],
)
def test_stationary_moments(scheme, temperature, noise):
    arguments = cases.STATIONARY[scheme] | {"temperature": temperature}
    kernel = make_kernel(scheme, gaussian(cases.deviations()), steps_per_draw=10, noise=noise, **arguments)
    theta, r, statistics = results(run(kernel, draws=cases.STATIONARY_DRAWS, warmup=40))
    scores = cases.stationary_scores(theta, r, lambda k, site: laws.stationary(cases.law(scheme, k, arguments, site)))
    cases.assert_scores(scores | cases.temperature_scores(statistics, scheme, arguments))
    cases.assert_statistics(statistics, theta, r, arguments)


@pytest.mark.parametrize(("case", "scheme"), cases.TRANSITIONS)
@pytest.mark.filterwarnings("ignore:resample_scale=0.6 differs")
def test_transition_law(case, scheme):
    deviations = {site: k**-0.5 for site, k in cases.TRANSITION_CURVATURE.items()}

    def model():
        for site, deviation in deviations.items():
            numpyro.sample(site, dist.Normal(0.0, deviation).expand([cases.TRANSITION_UNITS]).to_event(1))

    kernel = make_kernel(scheme, model, steps_per_draw=cases.STEPS_PER_DRAW, **cases.transition_arguments(case, scheme))
    start = {site: jnp.full(cases.TRANSITION_UNITS, cases.START) for site in deviations}
    theta, r, _ = results(run(kernel, draws=cases.DRAWS, start=start))
    cases.assert_scores(cases.transition_scores(case, scheme, theta, r))


def offset_model(y, subsample_size=None):
    theta = {n: numpyro.sample(n, dist.Normal(0.0, 1.0).expand([v.shape[1]]).to_event(1)) for n, v in y.items()}
    with numpyro.plate("data", cases.ROWS, subsample_size=subsample_size) as rows:
        for n, v in y.items():
            numpyro.sample(f"y_{n}", dist.Normal(theta[n], cases.ROWS**0.5).to_event(1), obs=v[rows])


@pytest.mark.parametrize(("scheme", "subsampling"), cases.GRADIENT_NOISES)
def test_gradient_noise(scheme, subsampling):
    arguments = cases.GRADIENT_NOISE[scheme]
    kernel = make_kernel(scheme, offset_model, subsampling=subsampling, steps_per_draw=cases.BATCHES, **arguments)
    theta, r, _ = results(run(kernel, cases.offset_data(cases.V), cases.BATCH, draws=cases.NOISE_DRAWS, warmup=10))
    cases.assert_scores(cases.gradient_noise_scores(theta, r, scheme, arguments, cases.V, subsampling))


@pytest.mark.parametrize("scheme", ["sgld", "baoab"])
def test_cooled_likelihood(scheme):
    """p(theta) p(y | theta)^(1/L) has the curvature 1 + 1/L, and is tempered by T like any target."""
    arguments = cases.GRADIENT_NOISE[scheme] | {"temperature": 0.5}
    kernel = make_kernel(scheme, offset_model, likelihood_temperature=4.0, steps_per_draw=10, **arguments)
    theta, r, _ = results(run(kernel, cases.offset_data(cases.V), draws=100, warmup=20))
    scores = {}
    for site in theta:
        covariance = laws.stationary(cases.law(scheme, 1.25, arguments, site))
        scores |= cases.moment_scores(site, theta[site], None if r is None else r[site], covariance)
    cases.assert_scores(scores)


@pytest.mark.parametrize("scheme", laws.SCHEMES)
def test_compensated_gradient_noise(scheme):
    """With batch_size= on the full-data model, and V a number (SGLD, equal sites) or a dict."""
    variance, subsampling = cases.COLD_V[scheme], "with_replacement"
    arguments = cases.GRADIENT_NOISE[scheme] | {"temperature": 0.1}
    kernel = make_kernel(
        scheme,
        offset_model,
        subsampling=subsampling,
        batch_size=cases.BATCH,
        steps_per_draw=cases.BATCHES,
        gradient_noise_variance=variance["a"] if scheme in laws.OVERDAMPED else variance,
        **arguments,
    )
    theta, r, _ = results(run(kernel, cases.offset_data(variance), draws=cases.NOISE_DRAWS, warmup=10))
    cases.assert_scores(cases.gradient_noise_scores(theta, r, scheme, arguments, variance, subsampling, True))


@pytest.mark.parametrize(("integrator", "L"), cases.REFRESHES)
def test_refresh(integrator, L):
    deviations = cases.deviations(cases.REFRESH_CURVATURES)
    kernel = SGHMC(gaussian(deviations), integrator=integrator, resample_every=L, steps_per_draw=20, **cases.REFRESH)
    theta, r, _ = results(run(kernel, draws=cases.REFRESH_DRAWS, warmup=40))
    covariance = cases.refresh_covariance(integrator, L)
    cases.assert_scores(cases.stationary_scores(theta, r, covariance, cases.REFRESH_CURVATURES))


@pytest.mark.parametrize("integrator", laws.UNDERDAMPED)
def test_refresh_at_another_temperature(integrator):
    def model():
        numpyro.sample("theta", dist.Normal(0.0, 0.5**0.5).expand([4000]).to_event(1))

    with pytest.warns(UserWarning, match=r"resample_scale=0.0333.* differs from temperature=0.5"):
        kernel = norm_adjusting_sghmc(model, integrator=integrator, **cases.NORM_ADJUSTING)
    theta, _, _ = results(run(kernel, draws=150, warmup=20))
    value = cases.NORM_ADJUSTING_VALUES[integrator] / 2
    cases.assert_scores({"second": laws.z_over_units(theta["theta"] ** 2, value)})


@pytest.mark.parametrize("integrator", laws.UNDERDAMPED)
@pytest.mark.filterwarnings("ignore:resample_scale")
def test_norm_adjusting_forms_agree(integrator):
    """Form A, boosted potential and noise at mass M and step h, is form B, mass alpha M and step alpha h."""
    alpha, gamma, beta, mass, friction, temperature, h = 3.0, 0.4, 0.7, 0.5, 1.2, 0.6, 0.05

    def energy(z):
        return jnp.sum((z["x"] ** 2 - 1) ** 2)

    form_a = SGHMC(
        potential_fn=lambda z: alpha * energy(z),
        step_size=h,
        friction=gamma * friction,
        mass=mass,
        temperature=alpha * temperature,
        resample_every=4,
        resample_scale=beta,
        integrator=integrator,
    )
    form_b = norm_adjusting_sghmc(
        potential_fn=energy,
        boost=alpha,
        adjust=gamma,
        momentum_scale=beta,
        friction=friction,
        mass=mass,
        step_size=alpha * h,
        temperature=temperature,
        resample_every=4,
        integrator=integrator,
    )
    start = {"x": jnp.linspace(-1.5, 1.5, 9)}
    a, b = (results(run(kernel, draws=30, start=start)) for kernel in (form_a, form_b))
    np.testing.assert_allclose(a[0]["x"], b[0]["x"], rtol=1e-9)
    np.testing.assert_allclose(a[1]["x"], b[1]["x"], rtol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_non_gaussian_targets(temperature):
    targets = {
        "quartic": densities.quartic(temperature=temperature),
        "double_well": densities.double_well(height=1.5, temperature=temperature),
    }
    kernel = SGHMC(
        potential_fn=lambda z: sum(target.energy(z[n]).sum() for n, target in targets.items()),
        step_size=0.1,
        friction=1.0,
        temperature=temperature,
        steps_per_draw=40,
    )
    start = {n: jnp.asarray(np.random.default_rng(1).choice([-1.0, 1.0], (3000, 1))) for n in targets}
    theta, r, statistics = results(run(kernel, draws=100, warmup=20, start=start))
    scores = {}
    for n, target in targets.items():
        x = theta[n][..., 0]
        scores |= {n: laws.z_over_units(x, 0.0), (n, 2): laws.z_over_units(x**2, target.variance[0])}
        scores[n, "r"] = laws.z_over_units(r[n][..., 0] ** 2, temperature)
    scores["T"] = laws.z_over_units(statistics["configurational_temperature"], temperature)
    cases.assert_scores(scores)


def replicated_regression(x, y, replicas, subsample_size):
    """Replicas of a regression that share their minibatches."""
    theta = numpyro.sample("theta", dist.Normal(0.0, 1.0).expand([replicas, 2]).to_event(2))
    with numpyro.plate("data", len(y), subsample_size=subsample_size) as rows:
        mean = x[rows] @ theta[:, :1].T + theta[:, 1]
        obs = jnp.broadcast_to(y[rows][:, None], mean.shape)
        numpyro.sample("y", dist.Normal(mean, cases.REGRESSION_NOISE).to_event(1), obs=obs)


POSTERIOR, _ = linear_regression_posterior(cases.REGRESSION_X, cases.REGRESSION_Y, noise_scale=cases.REGRESSION_NOISE)


@pytest.mark.parametrize("scheme", laws.SCHEMES)
def test_conjugate_regression(scheme):
    kernel = make_kernel(
        scheme,
        replicated_regression,
        subsampling="without_replacement",
        steps_per_draw=40,
        **cases.REGRESSION[scheme],
    )
    data = (cases.REGRESSION_X, cases.REGRESSION_Y, 400, cases.REGRESSION_BATCH)
    theta, _, _ = results(run(kernel, *data, draws=150, warmup=10))
    cases.assert_scores(cases.regression_scores(theta["theta"], scheme, POSTERIOR, laws.z_over_draws))


def test_conjugate_regression_in_many_chains():
    """The zoo's model; each chain has minibatches of its own."""
    kernel = make_kernel(
        "baoab",
        linear_regression(noise_scale=cases.REGRESSION_NOISE),
        subsampling="without_replacement",
        batch_size=cases.REGRESSION_BATCH,
        steps_per_draw=20,
        **cases.REGRESSION["baoab"],
    )
    mcmc = run(kernel, cases.REGRESSION_X, cases.REGRESSION_Y, draws=40, warmup=10, chains=250)
    samples, _, _ = results(mcmc, group_by_chain=True)
    theta = np.concatenate([samples["w"], samples["b"][..., None]], -1).swapaxes(0, 1)
    cases.assert_scores(cases.regression_scores(theta, "baoab", POSTERIOR, laws.z_over_units))


def test_a_scale_is_tempered_in_its_own_coordinates():
    """Half-normal to the power 1 / T: half-normal of scale sqrt(T), which needs T times the Jacobian."""

    def model():
        numpyro.sample("scale", dist.HalfNormal(1.0).expand([4000]).to_event(1))

    kernel = SGHMC(model, step_size=0.1, friction=0.5, temperature=0.1, steps_per_draw=30)
    theta, _, _ = results(run(kernel, draws=120, warmup=20))
    scale = theta["scale"]
    assert scale.min() > 0
    mean = laws.z_over_units(scale, (0.2 / np.pi) ** 0.5)
    cases.assert_scores({"mean": mean, "second": laws.z_over_units(scale**2, 0.1)})


def network(x, y):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    v = numpyro.sample("v", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 4]).to_event(2))
    with numpyro.plate("data", cases.NETWORK_ROWS):
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ w + b) @ v, cases.NETWORK_NOISE), obs=y)


@pytest.mark.parametrize(
    ("scheme", "momentum"), [("sgld", 0.0), ("baoab", 0.8), ("symplectic_euler", 0.8), ("symplectic_euler", 0.0)]
)
def test_zero_temperature_is_sgd(scheme, momentum):
    x, y = (jnp.asarray(array) for array in cases.network_data())
    rate, steps = 0.02, 25
    if scheme == "sgld":
        kernel = SGLD(network, step_size=rate / cases.NETWORK_ROWS, temperature=0.0)
    else:
        kernel = SGHMC.from_learning_rate(
            network,
            learning_rate=rate,
            momentum=momentum,
            num_data=cases.NETWORK_ROWS,
            mass=1.7,
            integrator=scheme,
            temperature=0.0,
        )

    def mean_loss(z):
        errors = y - jnp.tanh(x @ z["w"] + z["b"]) @ z["v"]
        prior = sum(jnp.sum(value**2) for value in z.values()) / 2
        return (jnp.sum(errors**2) / (2 * cases.NETWORK_NOISE**2) + prior) / cases.NETWORK_ROWS

    z = jax.tree.map(jnp.asarray, cases.network_start())
    theta, _, statistics = results(run(kernel, x, y, draws=steps, start=z))
    optimizer = optax.sgd(rate, momentum or None)
    state = optimizer.init(z)
    for step in range(steps):
        updates, state = optimizer.update(jax.grad(mean_loss)(z), state)
        z = optax.apply_updates(z, updates)
        for site in z:
            np.testing.assert_allclose(theta[site][step], z[site], rtol=1e-9, atol=1e-11)
    gradient = jax.grad(mean_loss)(z)
    norm = cases.NETWORK_ROWS * np.sqrt(sum(np.sum(np.square(g)) for g in gradient.values()))
    assert statistics["gradient_norm"][-1] == pytest.approx(norm, rel=1e-8)
