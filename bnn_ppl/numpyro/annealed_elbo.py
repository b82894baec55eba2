"""KL annealing: training with a weighted divergence, while the loss that is reported stays the negative ELBO.

With a weight beta, which training raises from 0 to 1 over its first epochs [1]_ [2]_::

    gradient of   -E_q log p(y | w) + beta KL(q | p),      value of   -E_q log p(y | w) + KL(q | p)

References
----------
.. [1] Bowman et al. (2016), Generating sentences from a continuous space.
.. [2] Sonderby et al. (2016), Ladder variational autoencoders.
"""

from collections.abc import Callable
from copy import copy
from typing import Any

import jax
from jax import Array, lax
from numpyro.infer import TraceMeanField_ELBO
from numpyro.primitives import Messenger

from bnn_ppl.divergences import check_kl_weight


class AnnealedELBO(TraceMeanField_ELBO):
    """``TraceMeanField_ELBO`` whose gradients have the divergence weighted, for ``numpyro.infer.SVI``.

    ``svi.update(state, *args, kl_weight=0.1)`` takes the weight. The loss it returns has the weight 1 always, so
    that losses compare over all steps.

    Parameters
    ----------
    num_particles, vectorize_particles
        As of the host's ``TraceMeanField_ELBO``. Sites are summed always.

    Raises
    ------
    ValueError
        In a step, if `kl_weight` is negative or not finite.

    Notes
    -----
    The divergence is all but the observed sites of the model, ``numpyro.factor`` among them. ``svi.run`` has one weight
    for all steps, and ``svi.init``, which it starts with, hands it to model and guide, so that it needs an
    ``init_state=svi.init(key, x, y)``: to raise the weight, loop over ``svi.update``, or scan it with ``lax.scan``.

    Examples
    --------
    >>> svi = SVI(model, guide, optax.adam(1e-3), AnnealedELBO())
    >>> state = svi.init(random.key(0), x, y)
    >>> update = jax.jit(svi.update)
    >>> for step in range(10_000):
    ...     state, loss = update(state, x, y, kl_weight=min(1.0, step / 1000))
    """

    def loss_with_mutable_state(
        self,
        rng_key: Array,
        param_map: dict,
        model: Callable,
        guide: Callable,
        *args: Any,
        kl_weight: Any = 1.0,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Loss and state; the host calls this."""
        if not isinstance(kl_weight, jax.core.Tracer):
            check_kl_weight(kl_weight)
        observed = _Observed(model)
        apart = copy(self)
        apart.sum_sites = False
        found = super(AnnealedELBO, apart).loss_with_mutable_state(rng_key, param_map, observed, guide, *args, **kwargs)
        by_site = found["loss"]
        fit = sum(value for name, value in by_site.items() if name in observed.names)
        divergence = sum(value for name, value in by_site.items() if name not in observed.names)
        annealed = fit + kl_weight * divergence
        return found | {"loss": annealed + lax.stop_gradient(fit + divergence - annealed)}


class _Observed(Messenger):
    """Note the names of the model's observed sites."""

    def __init__(self, fn: Callable):
        super().__init__(fn)
        self.names: set[str] = set()

    def process_message(self, msg: dict) -> None:
        if msg["type"] == "sample" and msg["is_observed"]:
            self.names.add(msg["name"])
