"""Preconditioned SGLD, tempered: ``theta += -h G g~ + sqrt(2 h T G) xi``, see `bnn_ppl.updates`.

``G = 1 / (b + sqrt(v))`` with v the moving average of g~^2 on each coordinate.

Reference: Li, Chen, Carlson & Carin (2016), Preconditioned stochastic gradient Langevin dynamics for deep neural
networks. Its ``Gamma`` term vanishes where G is frozen.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bnn_ppl import updates
from bnn_ppl.numpyro import adaptation
from bnn_ppl.numpyro.adaptation import Average
from bnn_ppl.numpyro.kernel import StochasticGradientKernel
from bnn_ppl.numpyro.potential import Evaluation
from bnn_ppl.numpyro.trees import draw_noise
from bnn_ppl.schedules import Schedule, value_at
from bnn_ppl.settings import PSGLDSettings
from bnn_ppl.statistics import POSITION


class PSGLDState(NamedTuple):
    """State of a chain; the statistics are those of the last draw, see `PSGLD`."""

    step: Array
    z: Any
    average: Average
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
    cycle: Array
    diverging: Array
    rng_key: Array


class PSGLD(StochasticGradientKernel):
    """Tempered SGLD with RMSprop's preconditioner, as a kernel for ``numpyro.infer.MCMC``.

    Parameters
    ----------
    model
        NumPyro model; its subsampled plates give the minibatches. Without one the full data are used.
    potential_fn
        Instead of `model`: function of the unconstrained values, any tree of arrays, that returns the scalar U.
        Needs ``init_params=`` in ``MCMC.run``.
    step_size
        h, above 0: multiplies G times the gradient of the sum over the data, like RMSprop's learning rate; a number or
        a callable of the gradient step, counted from the start of warm-up.
    temperature
        T of the target p(theta, y)^(1/T), at least 0; a number or a callable. 1 is the posterior, 0 is RMSprop.
    decay
        w, in [0, 1): share of the average of squared gradients that a step keeps.
    damping
        b, above 0, in units of the gradient of the sum: a coordinate whose gradients are much smaller has G = 1 / b.
    freeze
        Whether G is estimated in the warm-up alone, which must be there then, and the chain samples its target as SGLD
        does. With False G goes on following the gradients, and the draws have **a bias of order 1 - decay**, since the
        term for the change of G is left out.
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
        For arguments out of range here, and for models that cannot be sampled, or no warm-up with ``freeze=True``, at
        the start of ``MCMC.run``.

    Notes
    -----
    Each draw records the statistics of `bnn_ppl.statistics` but those of momenta, and `diverging`, as `SGHMC` does.
    The paper takes mean gradients and half steps: its lambda is b / N, and its epsilon 2 h / N.
    """

    state_type = PSGLDState
    extra_fields = ("average",)
    statistic_fields = (*POSITION, "diverging")
    settings: PSGLDSettings

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        step_size: float | Schedule,
        temperature: float | Schedule = 1.0,
        decay: float = 0.99,
        damping: float = 1.0,
        freeze: bool = True,
        steps_per_draw: int = 1,
        noise: str = "normal",
        subsampling: str = "epoch",
        batch_size: int | Mapping[str, int] | None = None,
        init_strategy: Callable | Mapping[str, Array] | None = None,
        minibatches: Iterable | None = None,
        likelihood_temperature: float = 1.0,
        control_variate: str | Mapping[str, Array] | None = None,
    ):
        settings = PSGLDSettings(
            step_size=step_size,
            temperature=temperature,
            decay=decay,
            damping=damping,
            freeze=freeze,
            steps_per_draw=steps_per_draw,
            noise=noise,
            subsampling=subsampling,
            batch_size=batch_size,
            likelihood_temperature=likelihood_temperature,
            control_variate=control_variate,
        )
        super().__init__(model, potential_fn, settings, init_strategy, minibatches)

    def start(self, words: Array, step: Array, z: Any, before: dict[str, Any] | None) -> dict[str, Any]:
        """An average of nothing yet, or that of a chain that starts anew."""
        return before or {"average": adaptation.begin(z, self.settings.adapts_until(self._warmup_draws))}

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
        """One gradient step, with its own gradient in the average."""
        average = adaptation.averaged(extra["average"], gradient, step, self.settings.decay)
        step_size = value_at(self.settings.step_size, step)
        noise_scale = jnp.sqrt(2.0 * step_size * self.settings.temperature_at(step))

        def moved(position: Array, slope: Array, xi: Array, square: Array) -> Array:
            preconditioner = 1.0 / (self.settings.damping + jnp.sqrt(square))
            numbers = {"step_size": step_size, "noise_scale": noise_scale}
            numbers = {name: jnp.asarray(value, position.dtype) for name, value in numbers.items()}
            return updates.preconditioned_sgld(position, slope, xi, preconditioner, **numbers)

        normal = draw_noise(noise_words, counter, z, self.settings.noise)
        return jax.tree.map(moved, z, gradient, normal, adaptation.unbiased(average)), {"average": average}
