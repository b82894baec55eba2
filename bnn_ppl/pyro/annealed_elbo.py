"""KL annealing: training with a weighted divergence, while the loss that is reported stays the negative ELBO.

With a weight beta, which training raises from 0 to 1 over its first epochs [1]_ [2]_::

    gradient of   -E_q log p(y | w) + beta KL(q | p),      value of   -E_q log p(y | w) + KL(q | p)

References
----------
.. [1] Bowman et al. (2016), Generating sentences from a continuous space.
.. [2] Sonderby et al. (2016), Ladder variational autoencoders.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyro.infer import TraceMeanField_ELBO
from pyro.poutine import Trace
from torch import Tensor

from bnn_ppl.divergences import check_kl_weight


class AnnealedELBO(TraceMeanField_ELBO):
    """``TraceMeanField_ELBO`` whose gradients have the divergence weighted, for ``pyro.infer.SVI``.

    ``svi.step(*args, kl_weight=0.1)`` takes the weight. The loss it returns has the weight 1 always, so
    that losses compare over all steps.

    Parameters
    ----------
    num_particles, vectorize_particles and others
        As of the host's ``TraceMeanField_ELBO``.

    Raises
    ------
    ValueError
        In a step, if `kl_weight` is negative or not finite.

    Notes
    -----
    The divergence is all but the observed sites of the model, ``pyro.factor`` among them.

    Examples
    --------
    >>> svi = SVI(model, guide, Adam({"lr": 1e-3}), AnnealedELBO())
    >>> for step in range(10_000):
    ...     loss = svi.step(x, y, kl_weight=min(1.0, step / 1000))
    """

    _kl_weight: Any = 1.0

    def loss(self, model: Callable, guide: Callable, *args: Any, kl_weight: Any = 1.0, **kwargs: Any) -> float:
        """Loss, whatever the weight is; the host calls this."""
        check_kl_weight(kl_weight)
        return super().loss(model, guide, *args, **kwargs)

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, kl_weight: Any = 1.0, **kwargs: Any
    ) -> Tensor:
        """Loss as a tensor whose gradient is the weighted one."""
        with self._weighted(kl_weight):
            return super().differentiable_loss(model, guide, *args, **kwargs)

    def loss_and_grads(
        self, model: Callable, guide: Callable, *args: Any, kl_weight: Any = 1.0, **kwargs: Any
    ) -> float:
        """Loss, with gradients added to those of the parameters; the host calls this."""
        with self._weighted(kl_weight):
            return super().loss_and_grads(model, guide, *args, **kwargs)

    @contextmanager
    def _weighted(self, kl_weight: Any) -> Iterator[None]:
        check_kl_weight(kl_weight)
        self._kl_weight = kl_weight
        try:
            yield
        finally:
            self._kl_weight = 1.0

    def _differentiable_loss_particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[float, Tensor]:
        loss, whole = super()._differentiable_loss_particle(model_trace, guide_trace)
        sites = model_trace.nodes.values()
        fit = -sum(site["log_prob_sum"] for site in sites if site["type"] == "sample" and site["is_observed"])
        annealed = fit + self._kl_weight * (whole - fit)
        return loss, annealed + (whole - annealed).detach()
