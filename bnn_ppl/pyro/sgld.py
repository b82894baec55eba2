"""Stochastic gradient Langevin dynamics, tempered: ``theta += -h g~ + sqrt(2 h T) xi``, see `bnn_ppl.updates`.

References: Welling & Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics; their epsilon is 2 h.
Leimkuhler & Matthews (2013), Rational construction of stochastic numerical methods for molecular sampling.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from bnn_ppl import updates
from bnn_ppl.pyro.kernel import StochasticGradientKernel
from bnn_ppl.schedules import Schedule
from bnn_ppl.settings import SGLDSettings
from bnn_ppl.statistics import POSITION


class SGLD(StochasticGradientKernel):
    """Tempered SGLD, as a kernel for ``pyro.infer.MCMC``.

    Parameters
    ----------
    model
        Pyro model; its subsampled plates give the minibatches. Without one the full data are used.
    potential_fn
        Instead of `model`: function of the unconstrained values, a dict of tensors, that returns the scalar U.
        Needs ``initial_params=`` in ``MCMC``.
    step_size
        h, above 0: multiplies the gradient of the sum over the data (Welling & Teh's epsilon is 2 h); a number or
        a callable of the gradient step, counted from the start of warm-up.
    temperature
        T of the target p(theta, y)^(1/T), at least 0; a number or a callable. 1 is the posterior, 0 is SGD.
    steps_per_draw
        Gradient steps between two draws of the host's MCMC.
    integrator
        ``"euler"``, or ``"lm"`` (Leimkuhler and Matthews), which carries its noise over a step: no bias of the variance
        on a Gaussian, whatever the step size, for full-data gradients or little noise in them.
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
        For arguments out of range here, and for models that cannot be sampled at the start of ``MCMC.run``.

    Notes
    -----
    Each draw records the statistics of `bnn_ppl.statistics` but those of momenta, and `diverging`, as `SGHMC` does.
    """

    statistic_fields = (*POSITION, "diverging")
    settings: SGLDSettings

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        step_size: float | Schedule,
        temperature: float | Schedule = 1.0,
        steps_per_draw: int = 1,
        integrator: str = "euler",
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
        settings = SGLDSettings(
            step_size=step_size,
            temperature=temperature,
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

    def start(self, before: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """The noise of the step before, where the integrator carries it."""
        self._noise_variance = self._per_coordinate(self.settings.gradient_noise_variance)
        return {"noise": self._noise()} if self.settings.integrator == "lm" else {}

    def coefficients(self, step: int) -> tuple[Tensor | float, ...]:
        """Step size and scale of the noise."""
        step_size = self._value("step_size", step)
        variance = updates.sgld_noise_variance(step_size, self._value("temperature", step), self._noise_variance)
        return step_size, variance**0.5

    def move(
        self, position: Tensor, extra: dict[str, Tensor], gradient: Tensor, noise: Tensor, coefficients: Sequence
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step."""
        numbers = dict(zip(("step_size", "noise_scale"), coefficients, strict=True))
        if not extra:
            return updates.sgld(position, gradient, noise, **numbers), extra
        moved = updates.leimkuhler_matthews(position, gradient, noise, extra["noise"], **numbers)
        return moved, {"noise": noise}
