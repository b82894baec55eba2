"""Preconditioned SGLD, tempered: ``theta += -h G g~ + sqrt(2 h T G) xi``, see `bnn_ppl.updates`.

``G = 1 / (b + sqrt(v))`` with v the moving average of g~^2 on each coordinate.

Reference: Li, Chen, Carlson & Carin (2016), Preconditioned stochastic gradient Langevin dynamics for deep neural
networks. Its ``Gamma`` term vanishes where G is frozen.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from bnn_ppl import updates
from bnn_ppl.pyro import adaptation
from bnn_ppl.pyro.kernel import StochasticGradientKernel
from bnn_ppl.schedules import Schedule
from bnn_ppl.settings import PSGLDSettings
from bnn_ppl.statistics import POSITION


class PSGLD(StochasticGradientKernel):
    """Tempered SGLD with RMSprop's preconditioner, as a kernel for ``pyro.infer.MCMC``.

    Parameters
    ----------
    model
        Pyro model; its subsampled plates give the minibatches. Without one the full data are used.
    potential_fn
        Instead of `model`: function of the unconstrained values, a dict of tensors, that returns the scalar U.
        Needs ``initial_params=`` in ``MCMC``.
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
    jit_compile
        Trace the gradient once and compile it with ``torch.compile``: slower to start, several times faster on
        small networks. The model must not branch on the values of tensors.

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
        For arguments out of range here, and for models that cannot be sampled, or no warm-up with ``freeze=True``, at
        the start of ``MCMC.run``.

    Notes
    -----
    Each draw records the statistics of `bnn_ppl.statistics` but those of momenta, and `diverging`, as `SGHMC` does.
    The paper takes mean gradients and half steps: its lambda is b / N, and its epsilon 2 h / N.
    """

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
        init_strategy: Callable | Mapping[str, Tensor] | None = None,
        minibatches: Iterable | None = None,
        likelihood_temperature: float = 1.0,
        control_variate: str | Mapping[str, Tensor] | None = None,
        jit_compile: bool = False,
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
        super().__init__(model, potential_fn, settings, init_strategy, minibatches, jit_compile)

    def start(self, before: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """An average of nothing yet, or that of a chain that starts anew."""
        self._preconditioner: Tensor | None = None
        return before or adaptation.begin(self._position, self.settings.adapts_until(self._warmup_steps))

    def coefficients(self, step: int) -> tuple[Tensor | float, ...]:
        """Preconditioner with the step's own gradient in its average, step size and scale of the noise."""
        average = adaptation.averaged(self._extra, self._grad, step, self.settings.decay)
        if self._preconditioner is None or average is not self._extra:
            self._extra = average
            self._preconditioner = 1.0 / (self.settings.damping + adaptation.unbiased(average).sqrt())
        step_size = self._value("step_size", step)
        return self._preconditioner, step_size, (2.0 * step_size * self._value("temperature", step)) ** 0.5

    def move(
        self, position: Tensor, extra: dict[str, Tensor], gradient: Tensor, noise: Tensor, coefficients: Sequence
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step."""
        preconditioner, step_size, noise_scale = coefficients
        moved = updates.preconditioned_sgld(
            position, gradient, noise, preconditioner, step_size=step_size, noise_scale=noise_scale
        )
        return moved, extra
