"""Stochastic gradient Hamiltonian Monte Carlo, tempered, with momentum resampling.

``dr = -grad U dt - C M^-1 r dt + N(0, 2 C T dt)``, ``dtheta = M^-1 r dt``, discretised as `bnn_ppl.updates`
says, with ``r ~ N(0, resample_scale M)`` every `resample_every` gradient steps.

References: Chen, Fox & Guestrin (2014), Stochastic gradient Hamiltonian Monte Carlo; Leimkuhler & Matthews (2013),
Rational construction of stochastic numerical methods for molecular sampling; Wenzel et al. (2020), How good is
the Bayes posterior in deep neural networks really?
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bnn_ppl import updates
from bnn_ppl.numpyro.kernel import Evaluation, StochasticGradientKernel
from bnn_ppl.numpyro.trees import dot, draw_noise, leaf_names, mean_products
from bnn_ppl.schedules import Schedule, value_at
from bnn_ppl.settings import INTEGRATORS, SGHMCSettings, at_site, learning_rate_arguments, norm_adjusting_arguments


class SGHMCState(NamedTuple):
    """State of a chain; the statistics are those of the last draw, see `SGHMC`."""

    step: Array
    z: Any
    momentum: Any
    stream: dict
    evaluation: Evaluation
    lp_minibatch: Array
    step_size: Array
    temperature: Array
    kinetic_temperature: Array
    configurational_temperature: Array
    site_kinetic_temperature: Array
    site_configurational_temperature: Array
    position_norm_sq: Array
    position_momentum: Array
    momentum_norm_sq: Array
    gradient_norm: Array
    diverging: Array
    rng_key: Array


class SGHMC(StochasticGradientKernel):
    """Tempered SGHMC with momentum resampling, as a kernel for ``numpyro.infer.MCMC``.

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
        C, above 0. The momentum forgets over the time M / C, that is over M / (C h) steps.
    mass
        M, above 0; a number, or a dict by site name.
    temperature
        T of the target p(theta, y)^(1/T), at least 0; a number or a callable. 1 is the posterior, 0 is SGD with
        momentum.
    resample_every
        Redraw the momentum every so many gradient steps; None for never.
    resample_scale
        Variance of the redrawn momentum over the mass; a number or a callable. None is the temperature, which
        preserves the target; **any other value changes the target** to an effective temperature between the two.
    steps_per_draw
        Gradient steps between two draws of the host's MCMC.
    integrator
        ``"baoab"``, or ``"symplectic_euler"``, which needs h C / M in (0, 2).
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
    gradient_noise_variance
        V, variance of one component of the minibatch gradient of U (sum scale), subtracted from the injected
        noise; a number, or a dict by site name.

    Raises
    ------
    ValueError
        For arguments out of range here, and for models that cannot be sampled at the start of ``MCMC.run``.

    Notes
    -----
    Each draw records, at its own position and with the minibatch there: `lp_minibatch` (minus the minibatch
    potential), `step_size`, `temperature`, `kinetic_temperature` (r' M^-1 r / d), `configurational_temperature`
    (theta' grad U / d), both by site too (`site_kinetic_temperature`, `site_configurational_temperature`, sites in
    the order of their names), `position_norm_sq`, `position_momentum` (theta' r), `momentum_norm_sq`, `gradient_norm`,
    all in unconstrained coordinates, and `diverging`: not finite at the end of the draw. Such a draw goes back to
    where it started with a new momentum.

    Examples
    --------
    >>> kernel = SGHMC(model, step_size=2e-3, friction=5.0, steps_per_draw=100)
    >>> mcmc = MCMC(kernel, num_warmup=200, num_samples=500)
    >>> mcmc.run(rng_key, x, y)
    """

    state_type = SGHMCState
    extra_fields = ("momentum",)
    statistic_fields = (
        "lp_minibatch",
        "step_size",
        "temperature",
        "kinetic_temperature",
        "configurational_temperature",
        "site_kinetic_temperature",
        "site_configurational_temperature",
        "position_norm_sq",
        "position_momentum",
        "momentum_norm_sq",
        "gradient_norm",
        "diverging",
    )
    settings: SGHMCSettings

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        step_size: float | Schedule,
        friction: float,
        mass: float | Mapping[str, float] = 1.0,
        temperature: float | Schedule = 1.0,
        resample_every: int | None = None,
        resample_scale: float | Schedule | None = None,
        steps_per_draw: int = 1,
        integrator: str = "baoab",
        noise: str = "normal",
        subsampling: str = "epoch",
        batch_size: int | Mapping[str, int] | None = None,
        init_strategy: Callable | Mapping[str, Array] | None = None,
        minibatches: Iterable | None = None,
        gradient_noise_variance: float | Mapping[str, float] = 0.0,
    ):
        settings = SGHMCSettings(
            step_size=step_size,
            friction=friction,
            mass=mass,
            temperature=temperature,
            resample_every=resample_every,
            resample_scale=resample_scale,
            steps_per_draw=steps_per_draw,
            integrator=integrator,
            noise=noise,
            subsampling=subsampling,
            batch_size=batch_size,
            gradient_noise_variance=gradient_noise_variance,
        )
        super().__init__(model, potential_fn, settings, init_strategy, minibatches)

    @classmethod
    def from_learning_rate(
        cls,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        learning_rate: float,
        momentum: float,
        num_data: int,
        mass: float = 1.0,
        integrator: str = "baoab",
        **arguments: Any,
    ) -> "SGHMC":
        """SGHMC in deep-learning terms; at temperature 0 it is SGD with momentum, step for step.

        Parameters
        ----------
        model, potential_fn
            As for the class.
        learning_rate
            l, for the mean loss U / N, above 0.
        momentum
            Share of the velocity that a step keeps, in (0, 1); 0 only with ``"symplectic_euler"``.
        num_data
            N, the rows of the data.
        mass
            M; it changes the scale of the momentum only.
        integrator
            ``"baoab"``: h = sqrt(2 l M / (N (1 + momentum))), C = -M log(momentum) / h;
            ``"symplectic_euler"``: h = sqrt(l M / N), C = (1 - momentum) M / h.
        **arguments
            Everything else that the class takes, but step_size and friction.

        Returns
        -------
        SGHMC

        Raises
        ------
        ValueError
            If an argument is out of range.
        """
        converted = learning_rate_arguments(learning_rate, momentum, num_data, mass, integrator)
        return cls(model, potential_fn, **converted, mass=mass, integrator=integrator, **arguments)

    def start(self, words: Array, step: Array, z: Any) -> dict[str, Any]:
        """Momentum drawn from N(0, T M)."""
        return {"momentum": self._fresh_momentum(words, jnp.int32(0), z, value_at(self.settings.temperature, step))}

    def _fresh_momentum(self, words: Array, counter: Array, z: Any, scale: Array | float) -> Any:
        normal = draw_noise(words, counter, z, "normal")
        leaves, structure = jax.tree.flatten(normal)
        masses = [at_site(self.settings.mass, name) for name in leaf_names(z)]
        return jax.tree.unflatten(
            structure, [(leaf * jnp.sqrt(m * scale)).astype(leaf.dtype) for leaf, m in zip(leaves, masses, strict=True)]
        )

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
        """One gradient step, after a momentum refresh where one is due."""
        settings = self.settings
        momentum = extra["momentum"]
        kick_fraction: Any = 1.0
        if settings.resample_every is not None:
            due = step % settings.resample_every == 0
            scale = value_at(settings.temperature if settings.resample_scale is None else settings.resample_scale, step)
            momentum = lax.cond(
                due, lambda: self._fresh_momentum(momentum_words, counter, z, scale), lambda: extra["momentum"]
            )
            kick_fraction = jnp.where(due, 0.5, 1.0)
        integrator = INTEGRATORS[settings.integrator]
        step_size = value_at(settings.step_size, step)
        temperature = value_at(settings.temperature, step)
        names = leaf_names(z)
        by_site = {
            (m, v): integrator.coefficients(step_size, settings.friction, m, temperature, v, kick_fraction)
            for m, v in {self._mass_and_noise(name) for name in names}
        }
        normal = draw_noise(noise_words, counter, z, settings.noise)
        moved = []
        leaves = [jax.tree.leaves(tree) for tree in (z, momentum, gradient, normal)]
        for position, r, slope, xi, name in zip(*leaves, names, strict=True):
            numbers = by_site[self._mass_and_noise(name)]
            numbers = updates.Coefficients(*(jnp.asarray(x, position.dtype) for x in numbers))
            moved.append(integrator.step(position, r, slope, xi, numbers))
        z, momentum = (jax.tree.unflatten(jax.tree.structure(z), list(part)) for part in zip(*moved, strict=True))
        return z, {"momentum": momentum}

    def _mass_and_noise(self, name: str | None) -> tuple[float, float]:
        return at_site(self.settings.mass, name), at_site(self.settings.gradient_noise_variance, name)

    def statistics(self, step: Array, z: Any, extra: dict[str, Any], now: Evaluation) -> dict[str, Array]:
        """Statistics of a draw at its own position."""
        momentum = extra["momentum"]
        masses = [at_site(self.settings.mass, name) for name in leaf_names(z)]
        kinetic, site_kinetic = mean_products(momentum, momentum, masses)
        configurational, site_configurational = mean_products(z, now.gradient)
        dtype = jnp.result_type(*jax.tree.leaves(z))
        return {
            "lp_minibatch": -now.energy,
            "step_size": jnp.asarray(value_at(self.settings.step_size, step), dtype),
            "temperature": jnp.asarray(value_at(self.settings.temperature, step), dtype),
            "kinetic_temperature": kinetic,
            "configurational_temperature": configurational,
            "site_kinetic_temperature": site_kinetic,
            "site_configurational_temperature": site_configurational,
            "position_norm_sq": dot(z, z),
            "position_momentum": dot(z, momentum),
            "momentum_norm_sq": dot(momentum, momentum),
            "gradient_norm": jnp.sqrt(dot(now.gradient, now.gradient)),
        }


def norm_adjusting_sghmc(
    model: Callable | None = None,
    potential_fn: Callable | None = None,
    *,
    boost: float,
    adjust: float,
    momentum_scale: float,
    resample_every: int,
    friction: float,
    mass: float | Mapping[str, float] = 1.0,
    **arguments: Any,
) -> SGHMC:
    """SGHMC in the terms of the norm-adjusting notes.

    Parameters
    ----------
    model, potential_fn
        As for `SGHMC`.
    boost
        alpha, above 0: the mass is alpha M. A step h of the notes' form A is ``step_size = alpha h`` here.
    adjust
        gamma, above 0: the friction is gamma C.
    momentum_scale
        beta, at least 0: momenta are redrawn from N(0, beta M). **The target is preserved only if
        beta = alpha T**; else the chain samples at a temperature between T and beta / alpha.
    resample_every
        Gradient steps between two momentum refreshes.
    friction, mass
        C and M.
    **arguments
        Everything else that `SGHMC` takes, but resample_scale.

    Returns
    -------
    SGHMC

    Raises
    ------
    ValueError
        If an argument is out of range.
    """
    converted = norm_adjusting_arguments(boost, adjust, momentum_scale, mass, friction)
    return SGHMC(model, potential_fn, **converted, resample_every=resample_every, **arguments)
