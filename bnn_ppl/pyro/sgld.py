"""Stochastic gradient Langevin dynamics, tempered: ``theta += -h g~ + sqrt(2 h T) xi``, see `bnn_ppl.updates`.

Reference: Welling & Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics; their epsilon is 2 h.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from bnn_ppl import updates
from bnn_ppl.pyro.kernel import StochasticGradientKernel
from bnn_ppl.schedules import Schedule
from bnn_ppl.settings import SGLDSettings


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
    jit_compile
        Trace the gradient once and compile it with ``torch.compile``: slower to start, several times faster on
        small networks. The model must not branch on the values of tensors.

    Raises
    ------
    ValueError
        For arguments out of range here, and for models that cannot be sampled at the start of ``MCMC.run``.

    Notes
    -----
    Each draw records `lp_minibatch`, `step_size`, `temperature`, `configurational_temperature`,
    `site_configurational_temperature`, `position_norm_sq`, `gradient_norm` and `diverging`, as `SGHMC` does.
    """

    statistic_fields = (
        "lp_minibatch",
        "step_size",
        "temperature",
        "configurational_temperature",
        "site_configurational_temperature",
        "position_norm_sq",
        "gradient_norm",
        "diverging",
    )
    settings: SGLDSettings

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        step_size: float | Schedule,
        temperature: float | Schedule = 1.0,
        steps_per_draw: int = 1,
        noise: str = "normal",
        subsampling: str = "epoch",
        batch_size: int | Mapping[str, int] | None = None,
        init_strategy: Callable | Mapping[str, Tensor] | None = None,
        minibatches: Iterable | None = None,
        gradient_noise_variance: float | Mapping[str, float] = 0.0,
        jit_compile: bool = False,
    ):
        settings = SGLDSettings(
            step_size=step_size,
            temperature=temperature,
            steps_per_draw=steps_per_draw,
            noise=noise,
            subsampling=subsampling,
            batch_size=batch_size,
            gradient_noise_variance=gradient_noise_variance,
        )
        super().__init__(model, potential_fn, settings, init_strategy, minibatches, jit_compile)

    def start(self) -> dict[str, Tensor]:
        """Nothing moves besides the position."""
        self._noise_variance = self._per_coordinate(self.settings.gradient_noise_variance)
        return {}

    def coefficients(self, step: int) -> tuple[Tensor | float, ...]:
        """Step size and scale of the noise."""
        step_size = self._value("step_size", step)
        variance = updates.sgld_noise_variance(step_size, self._value("temperature", step), self._noise_variance)
        return step_size, variance**0.5

    def move(
        self, position: Tensor, extra: dict[str, Tensor], gradient: Tensor, noise: Tensor, coefficients: Sequence
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step."""
        step_size, noise_scale = coefficients
        return updates.sgld(position, gradient, noise, step_size=step_size, noise_scale=noise_scale), extra

    def statistics(self, step: int) -> dict[str, Any]:
        """Statistics of a draw at its own position."""
        position, gradient = self._position, self._grad
        configurational = self._by_site(position * gradient)
        return {
            "lp_minibatch": -float(self._energy),
            "step_size": self._value("step_size", step),
            "temperature": self._value("temperature", step),
            "configurational_temperature": configurational[0],
            "site_configurational_temperature": configurational[1],
            "position_norm_sq": float(position @ position),
            "gradient_norm": float(gradient.norm()),
        }
