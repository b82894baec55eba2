"""Stochastic gradient Nosé-Hoover thermostat, tempered: SGHMC whose friction adapts to the gradient noise.

``dr = -grad U dt - x r dt + N(0, 2 C T dt)``, ``dtheta = r dt``, ``dx = (r'r / d - T) dt``, discretised as
`bnn_ppl.updates` says. At stationarity x is N(C, T / d); white gradient noise of variance V moves its mean to
C + h V / (2 T), and the momenta stay at T.

References: Ding et al. (2014), Bayesian sampling using stochastic gradient thermostats; Leimkuhler & Shang (2016),
Adaptive thermostats for noisy gradient systems.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from bnn_ppl import updates
from bnn_ppl.pyro.kernel import StochasticGradientKernel
from bnn_ppl.pyro.statistics import momentum_statistics
from bnn_ppl.schedules import Schedule
from bnn_ppl.settings import SGNHTSettings
from bnn_ppl.statistics import MOMENTUM, POSITION


class SGNHT(StochasticGradientKernel):
    """Tempered SGNHT, as a kernel for ``pyro.infer.MCMC``: it absorbs gradient noise alike in all directions.

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
        C, above 0: the thermostat's mean without gradient noise, and where it starts. The momentum forgets over the
        time 1 / C or less.
    temperature
        T of the target p(theta, y)^(1/T), above 0; a number or a callable. 1 is the posterior.
    steps_per_draw
        Gradient steps between two draws of the host's MCMC.
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
        For arguments out of range here, and for models that cannot be sampled at the start of ``MCMC.run``.

    Notes
    -----
    Each draw records the statistics of `bnn_ppl.statistics`, `thermostat` (x) and `diverging`. The mean of the kinetic
    temperature is T whatever the gradient noise: look at the configurational temperature. Noise that differs from
    direction to direction is not absorbed by one thermostat.

    Examples
    --------
    >>> kernel = SGNHT(model, step_size=2e-3, friction=5.0, steps_per_draw=100)
    >>> mcmc = MCMC(kernel, num_samples=500, warmup_steps=200)
    """

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
        init_strategy: Callable | Mapping[str, Tensor] | None = None,
        minibatches: Iterable | None = None,
        likelihood_temperature: float = 1.0,
        control_variate: str | Mapping[str, Tensor] | None = None,
        jit_compile: bool = False,
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
        super().__init__(model, potential_fn, settings, init_strategy, minibatches, jit_compile)

    def start(self, before: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Momentum drawn from N(0, T), thermostat at C."""
        momentum = self._noise() * self._value("temperature", self._step) ** 0.5
        return {"momentum": momentum, "thermostat": momentum.new_tensor(self.settings.friction)}

    def coefficients(self, step: int) -> tuple[float, ...]:
        """Step size and temperature."""
        return self._value("step_size", step), self._value("temperature", step)

    def move(
        self, position: Tensor, extra: dict[str, Tensor], gradient: Tensor, noise: Tensor, coefficients: Sequence
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step."""
        step_size, temperature = coefficients
        momentum = extra["momentum"] - step_size * gradient
        position = position + 0.5 * step_size * momentum
        thermostat = extra["thermostat"] + 0.5 * step_size * (momentum @ momentum / len(momentum) - temperature)
        decay, scale = updates.thermostat_factors(step_size, self.settings.friction, temperature, thermostat)
        momentum = decay * momentum + scale * noise
        thermostat = thermostat + 0.5 * step_size * (momentum @ momentum / len(momentum) - temperature)
        return position + 0.5 * step_size * momentum, {"momentum": momentum, "thermostat": thermostat}

    def statistics(self) -> dict[str, Any]:
        """Statistics of the momentum, and the thermostat."""
        momentum = momentum_statistics(self._position, self._extra["momentum"], self._grad, 1.0, self._numels)
        return momentum | {"thermostat": float(self._extra["thermostat"])}
