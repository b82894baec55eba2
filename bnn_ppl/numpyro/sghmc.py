"""Stochastic gradient Hamiltonian Monte Carlo, tempered, with momentum resampling.

``dr = -grad U dt - C M^-1 r dt + N(0, 2 C T dt)``, ``dtheta = M^-1 r dt``, discretised as `bnn_ppl.updates`
says, with ``r ~ N(0, resample_scale M)`` every `resample_every` gradient steps.

References: Chen, Fox & Guestrin (2014), Stochastic gradient Hamiltonian Monte Carlo; Leimkuhler & Matthews (2013),
Rational construction of stochastic numerical methods for molecular sampling; Wenzel et al. (2020), How good is
the Bayes posterior in deep neural networks really?; Springenberg, Klein, Falkner & Hutter (2016), Bayesian
optimization with robust Bayesian neural networks.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bnn_ppl import updates
from bnn_ppl.numpyro import adaptation
from bnn_ppl.numpyro.adaptation import Average
from bnn_ppl.numpyro.kernel import StochasticGradientKernel
from bnn_ppl.numpyro.potential import Evaluation
from bnn_ppl.numpyro.statistics import momentum_statistics
from bnn_ppl.numpyro.trees import draw_noise, leaf_names
from bnn_ppl.schedules import Schedule, value_at
from bnn_ppl.settings import (
    ADAPTED_MASSES,
    INTEGRATORS,
    SGHMCSettings,
    at_site,
    learning_rate_arguments,
    norm_adjusting_arguments,
)
from bnn_ppl.statistics import MOMENTUM, POSITION


class SGHMCState(NamedTuple):
    """State of a chain; the statistics are those of the last draw, see `SGHMC`."""

    step: Array
    z: Any
    momentum: Any
    mass: Any
    average: Average | None
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
        M, above 0; a number, or a dict by site name. ``"adapt"``: one for each site, as its root mean square gradient
        over the smallest of all sites (Wenzel et al.), from a moving average in the warm-up, renewed at each of its
        draws and fixed after it. ``"adapt_coordinates"``: one for each coordinate, as its root mean square gradient
        over the mean of all (Springenberg et al.), averaged over about 1000 steps. With both, **friction is per unit
        of mass**: C / M is the same for all.
    temperature
        T of the target p(theta, y)^(1/T), at least 0; a number or a callable. 1 is the posterior, 0 is SGD with
        momentum.
    resample_every
        Redraw the momentum every so many gradient steps; None for never.
    resample_scale
        Variance of the redrawn momentum over the mass; a number or a callable. None is the temperature, which
        preserves the target; **any other value changes the target** to an effective temperature between the two.
    resample_jitter
        Redraw the momentum at pseudo-random gradient steps, each with probability 1 / `resample_every`, instead of
        periodically: trajectories of one length can fail to mix where a motion returns after just that time. The steps
        are the same for all chains and seeds.
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
        For arguments out of range here, and for models that cannot be sampled, or no warm-up with adapted masses, at
        the start of ``MCMC.run``.

    Notes
    -----
    Each draw records the statistics of `bnn_ppl.statistics` at its own position, with the minibatch there, and
    `diverging`: not finite at the end of the draw. Such a draw goes back to where it started with a new momentum.

    Examples
    --------
    >>> kernel = SGHMC(model, step_size=2e-3, friction=5.0, steps_per_draw=100)
    >>> mcmc = MCMC(kernel, num_warmup=200, num_samples=500)
    >>> mcmc.run(rng_key, x, y)
    """

    state_type = SGHMCState
    extra_fields = ("momentum", "mass", "average")
    statistic_fields = (*POSITION, *MOMENTUM, "diverging")
    settings: SGHMCSettings

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        step_size: float | Schedule,
        friction: float,
        mass: float | Mapping[str, float] | str = 1.0,
        temperature: float | Schedule = 1.0,
        resample_every: int | None = None,
        resample_scale: float | Schedule | None = None,
        resample_jitter: bool = False,
        steps_per_draw: int = 1,
        integrator: str = "baoab",
        noise: str = "normal",
        subsampling: str = "epoch",
        batch_size: int | Mapping[str, int] | None = None,
        init_strategy: Callable | Mapping[str, Array] | None = None,
        minibatches: Iterable | None = None,
        gradient_noise_variance: float | Mapping[str, float] = 0.0,
        likelihood_temperature: float = 1.0,
        control_variate: str | Mapping[str, Array] | None = None,
    ):
        settings = SGHMCSettings(
            step_size=step_size,
            friction=friction,
            mass=mass,
            temperature=temperature,
            resample_every=resample_every,
            resample_scale=resample_scale,
            resample_jitter=resample_jitter,
            steps_per_draw=steps_per_draw,
            integrator=integrator,
            noise=noise,
            subsampling=subsampling,
            batch_size=batch_size,
            gradient_noise_variance=gradient_noise_variance,
            likelihood_temperature=likelihood_temperature,
            control_variate=control_variate,
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
        mass: float | str = 1.0,
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
            M; it changes the scale of the momentum only. If adapted, l is that of coordinates of mass 1, and l / M
            that of others.
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

    def start(self, words: Array, step: Array, z: Any, before: dict[str, Any] | None) -> dict[str, Any]:
        """Momentum drawn from N(0, T M), with the adapted masses of a chain that starts anew."""
        mass, average = (before["mass"], before["average"]) if before else (None, None)
        if before is None and isinstance(self.settings.mass, str):
            average = adaptation.begin(z, self.settings.adapts_until(self._warmup_draws))
            mass = adaptation.masses(self.settings.mass, average)  # all 1
        scale = self.settings.temperature_at(step)
        momentum = self._fresh_momentum(words, jnp.int32(0), z, self._masses(z, mass), scale)
        return {"momentum": momentum, "mass": mass, "average": average}

    def _masses(self, z: Any, adapted: Any) -> list[Any]:
        """Mass of each leaf."""
        if adapted is not None:
            return jax.tree.leaves(adapted)
        return [at_site(self.settings.given_mass, name) for name in leaf_names(z)]

    def _fresh_momentum(self, words: Array, counter: Array, z: Any, masses: list[Any], scale: Array | float) -> Any:
        normal = draw_noise(words, counter, z, "normal")
        leaves, structure = jax.tree.flatten(normal)
        return jax.tree.unflatten(
            structure, [(leaf * jnp.sqrt(m * scale)).astype(leaf.dtype) for leaf, m in zip(leaves, masses, strict=True)]
        )

    def begin_draw(self, step: Array, extra: dict[str, Any], gradient: Any) -> dict[str, Any]:
        """Masses renewed in the warm-up, with the gradient at hand as the next step will have it."""
        kind, average = self.settings.mass, extra["average"]
        if not isinstance(kind, str):
            return extra

        def renewed() -> tuple[Any, Any]:
            now = adaptation.averaged(average, gradient, step, ADAPTED_MASSES[kind])
            mass = adaptation.masses(kind, now)
            rescale = jax.tree.map(lambda r, new, old: r * jnp.sqrt(new / old), extra["momentum"], mass, extra["mass"])
            return rescale, mass

        momentum, mass = lax.cond(step < average.until, renewed, lambda: (extra["momentum"], extra["mass"]))
        return {"momentum": momentum, "mass": mass, "average": average}

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
        momentum, average = extra["momentum"], extra["average"]
        masses = self._masses(z, extra["mass"])
        if isinstance(settings.mass, str):
            average = adaptation.averaged(average, gradient, step, ADAPTED_MASSES[settings.mass])
        kick_fraction: Any = 1.0
        if settings.resample_every is not None:
            due = settings.refresh_is_due(step)
            scale = settings.resample_scale_at(step)
            momentum = lax.cond(
                due, lambda: self._fresh_momentum(momentum_words, counter, z, masses, scale), lambda: extra["momentum"]
            )
            kick_fraction = jnp.where(due, 0.5, 1.0)
        integrator = INTEGRATORS[settings.integrator]
        step_size = value_at(settings.step_size, step)
        temperature = settings.temperature_at(step)
        names = leaf_names(z)
        by_site = {
            (m, v): integrator.coefficients(step_size, settings.friction, m, temperature, v, kick_fraction)
            for m, v in {self._mass_and_noise(name) for name in names}
        }
        normal = draw_noise(noise_words, counter, z, settings.noise)
        moved = []
        leaves = [jax.tree.leaves(tree) for tree in (z, momentum, gradient, normal)]
        for position, r, slope, xi, m, name in zip(*leaves, masses, names, strict=True):
            numbers = by_site[self._mass_and_noise(name)]
            numbers = updates.Coefficients(*(jnp.asarray(x, position.dtype) for x in numbers))
            if extra["mass"] is not None:
                numbers = updates.at_adapted_mass(numbers, m)
            moved.append(integrator.step(position, r, slope, xi, numbers))
        z, momentum = (jax.tree.unflatten(jax.tree.structure(z), list(part)) for part in zip(*moved, strict=True))
        return z, {"momentum": momentum, "mass": extra["mass"], "average": average}

    def _mass_and_noise(self, name: str | None) -> tuple[float, float]:
        return at_site(self.settings.given_mass, name), at_site(self.settings.gradient_noise_variance, name)

    def statistics(self, z: Any, extra: dict[str, Any], now: Evaluation) -> dict[str, Array]:
        """Statistics of the momentum."""
        return momentum_statistics(z, extra["momentum"], now.gradient, self._masses(z, extra["mass"]))


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
