"""Stochastic gradient Nosé-Hoover thermostat, tempered: SGHMC whose friction adapts to the gradient noise.

``dr = -grad U dt - x r dt + N(0, 2 C T dt)``, ``dtheta = r dt``, ``dx = (r'r / d - T) dt``, discretised as
`bnn_ppl.updates` says. At stationarity x is N(C, T / d); white gradient noise of variance V moves its mean to
C + h V / (2 T), and the momenta stay at T.

References: Ding et al. (2014), Bayesian sampling using stochastic gradient thermostats; Leimkuhler & Shang (2016),
Adaptive thermostats for noisy gradient systems.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bnn_ppl import updates
from bnn_ppl.numpyro.kernel import StochasticGradientKernel
from bnn_ppl.numpyro.potential import Evaluation
from bnn_ppl.numpyro.statistics import momentum_statistics
from bnn_ppl.numpyro.trees import dot, draw_noise, number_of_coordinates
from bnn_ppl.schedules import Schedule, value_at
from bnn_ppl.settings import SGNHTSettings
from bnn_ppl.statistics import MOMENTUM, POSITION


class SGNHTState(NamedTuple):
    """State of a chain; the statistics are those of the last draw, see `bnn_ppl.statistics`."""

    step: Array
    z: Any
    momentum: Any
    thermostat: Array
    stream: dict
    control: Any
    evaluation: Evaluation
    lp_minibatch: Array
    step_size: Array
    temperature: Array
    configurational_temperature: Array
    site_configurational_temperature: Array
    position_norm_sq: Array
    site_position_norm_sq: Array
    gradient_norm: Array
    site_gradient_norm: Array
    kinetic_temperature: Array
    site_kinetic_temperature: Array
    position_momentum: Array
    site_position_momentum: Array
    momentum_norm_sq: Array
    site_momentum_norm_sq: Array
    momentum_gradient: Array
    site_momentum_gradient: Array
    cycle: Array
    diverging: Array
    rng_key: Array


class SGNHT(StochasticGradientKernel):
    """Tempered SGNHT, as a kernel for ``numpyro.infer.MCMC``: it absorbs gradient noise alike in all directions.

    Parameters
    ----------
    model
        NumPyro model; its subsampled plates give the minibatches. Without one the full data are used.
    potential_fn
        Instead of `model`: function of the unconstrained values, any tree of arrays, that returns the scalar U.
        Needs ``init_params=`` in ``MCMC.run``.
    step_size
        h of the SDE, above 0; a number or a callable of the gradient step, counted from the start of warm-up.
    friction
        C, above 0: the thermostat's mean without gradient noise, and where it starts. The momentum forgets over the
        time 1 / C or less.
    temperature
        T of the target p(theta, y)^(1/T), above 0; a number or a callable. 1 is the posterior.
    steps_per_draw
        Gradient steps between two draws of the host's MCMC.
    noise
        ``"normal"``, or ``"fast"``: bounded noise with the moments of a normal up to the third, kurtosis 2.94,
        cheaper on a CPU and enough for a scheme of weak order 1.
    subsampling
        ``"epoch"``: each index once per epoch, in a fresh order; ``"without_replacement"``: a fresh subset each
        step; ``"with_replacement"``.
    batch_size
        Rows of a minibatch for a model with a full-data plate; an int, or a dict by plate name. The data must
        pass through the plate's indices or ``numpyro.subsample``.
    init_strategy
        NumPyro init strategy, such as ``init_to_median``, or a dict of values by site in the user's coordinates, such
        as a draw, a guide's median or an optimiser's result; sites not in it start near the prior's centre. By
        default `init_to_prior_center`.
    minibatches
        Iterable of batches, for data that are larger than memory or augmented: a torch DataLoader, a list. Each is
        a tuple of arrays (the model's first arguments), a dict (keyword arguments) or one array; arguments of
        ``MCMC.run`` follow. The model is called on one batch, and its plate states the rows of all:
        ``plate("data", N, subsample_size=len(x))``. B is the length of the first batch; a short last one is
        filled up from the next epoch, so that each row counts once an epoch. Shuffling is the iterable's work, and
        without it the draws are biased. Random augmentation, fresh in each epoch, makes the target
        exp(E[log likelihood]) times the prior, with each row counted once. Each chain iterates on its own. A
        resumed run begins a new epoch; NumPyro, which calls back to Python at each step, goes on where it was if
        kernel and process are the same.
    likelihood_temperature
        L of p(theta) p(y | theta)^(1/L), above 0: a "power posterior", **which is another target** than that of
        `temperature`, and may be combined with it. Needs a `model`.
    control_variate
        Reduces the noise of the minibatch gradients, for twice their cost: ``"svrg"`` compares each with that at the
        position where the draw began, where all rows are visited once; a dict of values by site, such as an optimiser's
        result in the user's coordinates, with that at this fixed centre. It pays where the chain stays near the centre;
        far away it adds noise. Needs a model with one subsampled plate.

    Raises
    ------
    ValueError
        For arguments out of range here, and for models that cannot be sampled at the start of ``MCMC.run``.

    Notes
    -----
    Each draw records the statistics of `bnn_ppl.statistics`, `thermostat` (x) and `diverging`. The mean of the kinetic
    temperature is T whatever the gradient noise: look at the configurational temperature. Noise that differs from
    direction to direction is not absorbed by one thermostat.

    Examples
    --------
    >>> kernel = SGNHT(model, step_size=2e-3, friction=5.0, steps_per_draw=100)
    >>> mcmc = MCMC(kernel, num_warmup=200, num_samples=500)
    """

    state_type = SGNHTState
    extra_fields = ("momentum", "thermostat")
    statistic_fields = (*POSITION, *MOMENTUM, "thermostat", "diverging")
    settings: SGNHTSettings

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        step_size: float | Schedule,
        friction: float,
        temperature: float | Schedule = 1.0,
        steps_per_draw: int = 1,
        noise: str = "normal",
        subsampling: str = "epoch",
        batch_size: int | Mapping[str, int] | None = None,
        init_strategy: Callable | Mapping[str, Array] | None = None,
        minibatches: Iterable | None = None,
        likelihood_temperature: float = 1.0,
        control_variate: str | Mapping[str, Array] | None = None,
    ):
        settings = SGNHTSettings(
            step_size=step_size,
            friction=friction,
            temperature=temperature,
            steps_per_draw=steps_per_draw,
            noise=noise,
            subsampling=subsampling,
            batch_size=batch_size,
            likelihood_temperature=likelihood_temperature,
            control_variate=control_variate,
        )
        super().__init__(model, potential_fn, settings, init_strategy, minibatches)

    def start(self, words: Array, step: Array, z: Any, before: dict[str, Any] | None) -> dict[str, Any]:
        """Momentum drawn from N(0, T), thermostat at C."""
        scale = jnp.sqrt(self.settings.temperature_at(step))
        normal = draw_noise(words, jnp.int32(0), z, "normal")
        dtype = jnp.result_type(*jax.tree.leaves(z))
        momentum = jax.tree.map(lambda leaf: (leaf * scale).astype(leaf.dtype), normal)
        return {"momentum": momentum, "thermostat": jnp.asarray(self.settings.friction, dtype)}

    def advance(
        self,
        step: Array,
        z: Any,
        extra: dict[str, Any],
        gradient: Any,
        noise_words: Array,
        counter: Array,
        momentum_words: Array,
    ) -> tuple[Any, dict[str, Any]]:
        """One gradient step."""
        momentum, thermostat = extra["momentum"], extra["thermostat"]
        step_size = jnp.asarray(value_at(self.settings.step_size, step), thermostat.dtype)
        temperature = jnp.asarray(self.settings.temperature_at(step), thermostat.dtype)
        size = number_of_coordinates(z)

        def drift(z: Any, momentum: Any) -> Any:
            return jax.tree.map(lambda x, r: x + (0.5 * step_size * r).astype(x.dtype), z, momentum)

        def heated(thermostat: Array, momentum: Any) -> Array:
            return thermostat + 0.5 * step_size * (dot(momentum, momentum) / size - temperature)

        momentum = jax.tree.map(lambda r, g: r - (step_size * g).astype(r.dtype), momentum, gradient)
        z = drift(z, momentum)
        thermostat = heated(thermostat, momentum)
        decay, scale = updates.thermostat_factors(step_size, self.settings.friction, temperature, thermostat)
        normal = draw_noise(noise_words, counter, z, self.settings.noise)
        momentum = jax.tree.map(lambda r, xi: (decay * r + scale * xi).astype(r.dtype), momentum, normal)
        return drift(z, momentum), {"momentum": momentum, "thermostat": heated(thermostat, momentum)}

    def statistics(self, z: Any, extra: dict[str, Any], now: Evaluation) -> dict[str, Array]:
        """Statistics of the momentum; the thermostat is in the state."""
        return momentum_statistics(z, extra["momentum"], now.gradient, [1.0] * len(jax.tree.leaves(z)))
