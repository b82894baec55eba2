"""One step of each dynamics, as plain arithmetic on arrays of either backend.

The stochastic gradient g~ estimates grad U; U is a sum over the data, T the temperature, M the mass, C the
friction, h the step, xi standard normal noise that the caller draws. V is the variance of one component of
g~, subtracted from the injected noise when the user knows it (0 otherwise).

SGLD [1]_, ``"euler"`` (h multiplies the sum gradient), and ``"lm"`` [2]_, whose noise is carried over a step::

    theta += -h g~ + sqrt(2 h T - h^2 V) xi
    theta += -h g~ + sqrt(2 h T - h^2 V) (xi_before + xi) / 2

SGHMC, ``"baoab"`` [2]_ with one gradient a step (its end-of-step momentum is that of BAOA), c = exp(-h C / M)::

    r     -= h g~
    theta += (h / 2M) r
    r      = c r + sqrt(M T (1 - c^2) - h^2 V (1 + c)^2 / 4) xi
    theta += (h / 2M) r

SGHMC, ``"symplectic_euler"`` [3]_, momentum first, a = h C / M::

    r      = (1 - a) r - h g~ + sqrt(2 a M T - h^2 V) xi
    theta += (h / M) r

SGNHT [4]_, whose thermostat x takes the place of the friction and absorbs gradient noise, split as in [5]_ with one
gradient a step, on d coordinates of unit mass::

    r     -= h g~
    theta += (h / 2) r
    x     += (h / 2) (r'r / d - T)
    r      = exp(-h x) r + sqrt(2 C T h f(-2 h x)) xi,    f(y) = (exp(y) - 1) / y
    x     += (h / 2) (r'r / d - T)
    theta += (h / 2) r

pSGLD [6]_, preconditioned by G = 1 / (b + sqrt(v)), with the moving average v = w v + (1 - w) g~^2 over its weight,
which is 1 - w^n after n gradients::

    theta += -h G g~ + sqrt(2 h T G) xi

On the step after a momentum refresh both kick with h / 2 instead of h: the momentum was just drawn from its
stationary law, so only the half step that belongs to this side of the refresh is due.

References
----------
.. [1] Welling & Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics.
.. [2] Leimkuhler & Matthews (2013), Rational construction of stochastic numerical methods for molecular sampling.
.. [3] Chen, Fox & Guestrin (2014), Stochastic gradient Hamiltonian Monte Carlo.
.. [4] Ding, Fang, Babbush, Chen, Skeel & Neven (2014), Bayesian sampling using stochastic gradient thermostats.
.. [5] Leimkuhler & Shang (2016), Adaptive thermostats for noisy gradient systems.
.. [6] Li, Chen, Carlson & Carin (2016), Preconditioned stochastic gradient Langevin dynamics.
"""

from typing import Any, NamedTuple

from bnn_ppl.namespaces import namespace

Array = Any


class Coefficients(NamedTuple):
    """Numbers that multiply the terms of one underdamped step; scalars, or arrays that broadcast."""

    kick: Array
    decay: Array
    drift: Array
    noise_scale: Array


def sgld_noise_variance(step_size: Array, temperature: Array, gradient_noise_variance: Array) -> Array:
    """Variance of the noise that SGLD injects; negative where the compensation asks for too much."""
    return 2.0 * step_size * temperature - step_size**2 * gradient_noise_variance


def sgld(position: Array, gradient: Array, noise: Array, *, step_size: Array, noise_scale: Array) -> Array:
    """Next position of SGLD."""
    return position - step_size * gradient + noise_scale * noise


def leimkuhler_matthews(
    position: Array, gradient: Array, noise: Array, before: Array, *, step_size: Array, noise_scale: Array
) -> Array:
    """Next position of ``"lm"``; `before` is the noise of the step before."""
    return sgld(position, gradient, 0.5 * (before + noise), step_size=step_size, noise_scale=noise_scale)


def baoab_noise_variance(
    step_size: Array, friction: Array, mass: Array, temperature: Array, gradient_noise_variance: Array
) -> Array:
    """Variance of the noise that BAOAB injects; negative where the compensation asks for too much."""
    rate = step_size * friction / mass
    xp = namespace(rate)
    heat = mass * temperature * -xp.expm1(-2.0 * rate)
    return heat - (0.5 * step_size * (1.0 + xp.exp(-rate))) ** 2 * gradient_noise_variance


def symplectic_euler_noise_variance(
    step_size: Array, friction: Array, mass: Array, temperature: Array, gradient_noise_variance: Array
) -> Array:
    """Variance of the noise that symplectic Euler injects; negative where the compensation asks for too much."""
    del mass
    return 2.0 * step_size * friction * temperature - step_size**2 * gradient_noise_variance


def baoab_coefficients(
    step_size: Array,
    friction: Array,
    mass: Array,
    temperature: Array,
    gradient_noise_variance: Array,
    kick_fraction: Array = 1.0,
) -> Coefficients:
    """Coefficients of `baoab`; `kick_fraction` is 1/2 right after a momentum refresh, else 1."""
    rate = step_size * friction / mass
    variance = baoab_noise_variance(step_size, friction, mass, temperature, kick_fraction**2 * gradient_noise_variance)
    return Coefficients(
        kick=kick_fraction * step_size,
        decay=namespace(rate).exp(-rate),
        drift=0.5 * step_size / mass,
        noise_scale=namespace(variance).sqrt(variance),
    )


def symplectic_euler_coefficients(
    step_size: Array,
    friction: Array,
    mass: Array,
    temperature: Array,
    gradient_noise_variance: Array,
    kick_fraction: Array = 1.0,
) -> Coefficients:
    """Coefficients of `symplectic_euler`; `kick_fraction` is 1/2 right after a momentum refresh, else 1."""
    variance = symplectic_euler_noise_variance(
        step_size, friction, mass, temperature, kick_fraction**2 * gradient_noise_variance
    )
    return Coefficients(
        kick=kick_fraction * step_size,
        decay=1.0 - step_size * friction / mass,
        drift=step_size / mass,
        noise_scale=namespace(variance).sqrt(variance),
    )


def at_adapted_mass(unit: Coefficients, mass: Array) -> Coefficients:
    """Coefficients at a mass, from those at mass 1 with the same friction per unit of mass."""
    return unit._replace(drift=unit.drift / mass, noise_scale=unit.noise_scale * namespace(mass).sqrt(mass))


def baoab(
    position: Array, momentum: Array, gradient: Array, noise: Array, coefficients: Coefficients
) -> tuple[Array, Array]:
    """Next position and momentum of BAOAB with one gradient a step."""
    kick, decay, drift, noise_scale = coefficients
    momentum = momentum - kick * gradient
    position = position + drift * momentum
    momentum = decay * momentum + noise_scale * noise
    return position + drift * momentum, momentum


def symplectic_euler(
    position: Array, momentum: Array, gradient: Array, noise: Array, coefficients: Coefficients
) -> tuple[Array, Array]:
    """Next position and momentum of momentum-first symplectic Euler."""
    kick, decay, drift, noise_scale = coefficients
    momentum = decay * momentum - kick * gradient + noise_scale * noise
    return position + drift * momentum, momentum


def thermostat_factors(step_size: Array, friction: Array, temperature: Array, thermostat: Array) -> tuple[Array, Array]:
    """Decay of the momentum and scale of the noise at a value of SGNHT's thermostat, which may be negative."""
    exponent = -2.0 * step_size * thermostat
    xp = namespace(exponent)
    small = abs(exponent) < 1e-4
    share = xp.where(small, 1.0 + 0.5 * exponent, xp.expm1(exponent) / xp.where(small, 1.0, exponent))
    return xp.exp(0.5 * exponent), xp.sqrt(2.0 * friction * temperature * step_size * share)


def moving_average(average: Array, value: Array, decay: Array) -> Array:
    """Next moving average; `decay` is the share that it keeps."""
    return decay * average + (1.0 - decay) * value


def preconditioned_sgld(
    position: Array, gradient: Array, noise: Array, preconditioner: Array, *, step_size: Array, noise_scale: Array
) -> Array:
    """Next position of pSGLD; `noise_scale` is sqrt(2 h T)."""
    root = namespace(preconditioner).sqrt(preconditioner)
    return position - step_size * preconditioner * gradient + noise_scale * root * noise
