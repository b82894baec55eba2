"""Stochastic gradient Hamiltonian Monte Carlo, tempered, with momentum resampling.

``dr = -grad U dt - C M^-1 r dt + N(0, 2 C T dt)``, ``dtheta = M^-1 r dt``, discretised as `bnn_ppl.updates`
says, with ``r ~ N(0, resample_scale M)`` every `resample_every` gradient steps.

References: Chen, Fox & Guestrin (2014), Stochastic gradient Hamiltonian Monte Carlo; Leimkuhler & Matthews (2013),
Rational construction of stochastic numerical methods for molecular sampling; Wenzel et al. (2020), How good is
the Bayes posterior in deep neural networks really?; Springenberg, Klein, Falkner & Hutter (2016), Bayesian
optimization with robust Bayesian neural networks.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from bnn_ppl import updates
from bnn_ppl.pyro import adaptation
from bnn_ppl.pyro.kernel import StochasticGradientKernel
from bnn_ppl.pyro.statistics import momentum_statistics
from bnn_ppl.schedules import Schedule
from bnn_ppl.settings import (
    ADAPTED_MASSES,
    INTEGRATORS,
    SGHMCSettings,
    learning_rate_arguments,
    norm_adjusting_arguments,
)
from bnn_ppl.statistics import MOMENTUM, POSITION


class SGHMC(StochasticGradientKernel):
    """Tempered SGHMC with momentum resampling, as a kernel for ``pyro.infer.MCMC``.

    Parameters
    ----------
    model
        Pyro model; its subsampled plates give the minibatches. Without one the full data are used.
    potential_fn
        Instead of `model`: function of the unconstrained values, a dict of tensors, that returns the scalar U.
        Needs ``initial_params=`` in ``MCMC``.
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
        ``"normal"``; NumPyro has a cheaper ``"fast"``.
    subsampling
        ``"epoch"``: each index once per epoch, in a fresh order; ``"without_replacement"``: a fresh subset each
        step; ``"with_replacement"``.
    batch_size
        Rows of a minibatch for a model with a full-data plate; an int, or a dict by plate name. The data must
        pass through the plate's indices or ``pyro.subsample``.
    init_strategy
        Pyro init strategy, such as ``init_to_median``, or a dict of values by site in the user's coordinates, such
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
    jit_compile
        Trace the gradient once and compile it with ``torch.compile``: slower to start, several times faster on
        small networks. The model must not branch on the values of tensors.

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
    >>> mcmc = MCMC(kernel, num_samples=500, warmup_steps=200)
    >>> mcmc.run(x, y)
    """

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
        init_strategy: Callable | Mapping[str, Tensor] | None = None,
        minibatches: Iterable | None = None,
        gradient_noise_variance: float | Mapping[str, float] = 0.0,
        likelihood_temperature: float = 1.0,
        control_variate: str | Mapping[str, Tensor] | None = None,
        jit_compile: bool = False,
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
        super().__init__(model, potential_fn, settings, init_strategy, minibatches, jit_compile)

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

    def start(self, before: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Momentum drawn from N(0, T M), with the adapted masses of a chain that starts anew."""
        self._mass = self._per_coordinate(self.settings.given_mass)
        self._noise_variance = self._per_coordinate(self.settings.gradient_noise_variance)
        self._known: dict[tuple, updates.Coefficients] = {}
        adapted: dict[str, Tensor] = {}
        if isinstance(self.settings.mass, str):
            average = adaptation.begin(self._position, self.settings.adapts_until(self._warmup_steps))
            mass = adaptation.masses(self.settings.mass, average, self._numels)  # all 1
            adapted = before or {"mass": mass, **average}
        return {**adapted, "momentum": self._fresh_momentum(self._value("temperature", self._step), adapted)}

    def _fresh_momentum(self, scale: float, extra: dict[str, Tensor]) -> Tensor:
        return self._noise() * (extra.get("mass", self._mass) * scale) ** 0.5

    def begin_draw(self) -> None:
        """Renew masses in the warm-up, with the gradient at hand as the next step will have it."""
        kind, extra = self.settings.mass, self._extra
        if not isinstance(kind, str) or self._step >= int(extra["until"]):
            return
        average = adaptation.averaged(extra, self._grad, self._step, ADAPTED_MASSES[kind])
        mass = adaptation.masses(kind, average, self._numels)
        self._extra = extra | {"mass": mass, "momentum": extra["momentum"] * (mass / extra["mass"]) ** 0.5}
        self._known = {}

    def coefficients(self, step: int) -> updates.Coefficients:
        """Those of the integrator, after a momentum refresh where one is due."""
        settings = self.settings
        kick_fraction = 1.0
        if isinstance(settings.mass, str):
            self._extra = adaptation.averaged(self._extra, self._grad, step, ADAPTED_MASSES[settings.mass])
        if settings.resample_every is not None and settings.refresh_is_due(step):
            name = "temperature" if settings.resample_scale is None else "resample_scale"
            self._extra["momentum"] = self._fresh_momentum(self._value(name, step), self._extra)
            kick_fraction = 0.5
        changing = (self._value("step_size", step), self._value("temperature", step), kick_fraction)
        if changing not in self._known:
            if len(self._known) > 1:
                self._known.clear()
            step_size, temperature, _ = changing
            known = INTEGRATORS[settings.integrator].coefficients(
                step_size, settings.friction, self._mass, temperature, self._noise_variance, kick_fraction
            )
            if "mass" in self._extra:
                known = updates.at_adapted_mass(known, self._extra["mass"])
            self._known[changing] = known
        return self._known[changing]

    def move(
        self, position: Tensor, extra: dict[str, Tensor], gradient: Tensor, noise: Tensor, coefficients: Sequence
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The integrator's step."""
        integrate = INTEGRATORS[self.settings.integrator].step
        position, momentum = integrate(
            position, extra["momentum"], gradient, noise, updates.Coefficients(*coefficients)
        )
        return position, extra | {"momentum": momentum}

    def statistics(self) -> dict[str, Any]:
        """Statistics of the momentum."""
        mass = self._extra.get("mass", self._mass)
        return momentum_statistics(self._position, self._extra["momentum"], self._grad, mass, self._numels)


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
