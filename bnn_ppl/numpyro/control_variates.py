"""Control variates: minibatch gradients that are exact at a centre c, and have little noise near it.

With B the rows of a minibatch and U_B, U the potentials on it and on all rows::

    g~(z) = grad U_B(z) - grad U_B(c) + grad U(c)

which has the mean grad U(z) whatever c is. c is fixed [1]_, or moves with the chain ("svrg", [2]_). The gradient on all
rows is the mean over blocks of rows, weighted by their lengths, so that the prior counts once.

References
----------
.. [1] Baker, Fearnhead, Fox & Nemeth (2019), Control variates for stochastic gradient MCMC.
.. [2] Dubey, Reddi, Poczos, Smola, Xing & Williamson (2016), Variance reduction in stochastic gradient Langevin
   dynamics; after Johnson & Zhang (2013).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bnn_ppl.layout import Plate


class Control(NamedTuple):
    """A centre, and the gradient on all rows there."""

    centre: Any
    gradient: Any


def control_at(energy: Callable, plate: Plate, centre: Any) -> Control:
    """Evaluate the gradient of ``energy(z, temperature, batch)`` on all rows, in blocks as long as a minibatch.

    Parameters
    ----------
    energy
        The minibatch potential. The temperature, which weighs the log-Jacobian alone, is 0: it cancels.
    plate
        The one plate of which a minibatch takes a part.
    centre
        c, unconstrained.

    Returns
    -------
    Control
    """
    size, rows = plate.size, plate.batch_size
    whole = size // rows * rows

    def gradient(index: Array) -> Any:
        share = len(index) / size
        return jax.tree.map(lambda g: share * g, jax.grad(energy)(centre, jnp.zeros(()), {plate.name: index}))

    def add(total: Any, index: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(index)), None

    blocks = jnp.arange(whole, dtype=jnp.int32).reshape(-1, rows)
    total, _ = lax.scan(add, jax.tree.map(jnp.zeros_like, centre), blocks)
    if whole < size:
        total, _ = add(total, jnp.arange(whole, size, dtype=jnp.int32))
    return Control(centre, total)


def corrected(energy: Callable, control: Control, batch: Any, gradient: Any) -> Any:
    """The minibatch gradient less that at the centre, plus that on all rows there."""
    at_centre = jax.grad(energy)(control.centre, jnp.zeros(()), batch)
    return jax.tree.map(lambda g, a, full: g - a + full, gradient, at_centre, control.gradient)
