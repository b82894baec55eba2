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
from typing import Any

import torch
from torch import Tensor

from bnn_ppl.layout import Plate

CENTRE, GRADIENT = "control centre", "control gradient"  # beside the plates' rows in a batch


def control_at(energy: Callable, plate: Plate, centre: Tensor, device: Any) -> dict[str, Tensor]:
    """Evaluate the gradient of ``energy(z, temperature, batch)`` on all rows, in blocks as long as a minibatch.

    Parameters
    ----------
    energy
        The minibatch potential of a flat position. The temperature, which weighs the log-Jacobian alone, is 0: it
        cancels.
    plate
        The one plate of which a minibatch takes a part.
    centre
        c, unconstrained, shape (d,).
    device
        Where the plate's indices live.

    Returns
    -------
    dict
        c, and the gradient there, shape (d,), for a batch.
    """
    total = torch.zeros_like(centre)
    for index in torch.arange(plate.size, device=device).split(plate.batch_size):
        total += len(index) / plate.size * torch.func.grad(energy)(centre, 0.0, {plate.name: index})
    return {CENTRE: centre, GRADIENT: total}


def corrected(energy: Callable) -> Callable:
    """The potential with another gradient: that of the minibatch less that at the centre, plus that on all rows."""

    def with_control(flat: Tensor, temperature: Any, batch: dict[str, Tensor], args: tuple, kwargs: dict) -> Tensor:
        rows = {name: index for name, index in batch.items() if name not in (CENTRE, GRADIENT)}
        at_centre = torch.func.grad(energy)(batch[CENTRE], 0.0, rows, args, kwargs)
        shift = flat @ (batch[GRADIENT] - at_centre).detach()
        return energy(flat, temperature, rows, args, kwargs) + shift - shift.detach()

    return with_control
