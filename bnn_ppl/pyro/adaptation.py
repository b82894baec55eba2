"""Moving averages of squared gradients, and the masses that SGHMC makes of them during the warm-up.

With v the average of g~^2 over the last gradient steps, weighted so that it may start at 0, v_s its mean over a site s,
and w its decay, a site has [1]_ the first mass after n gradients, a coordinate i [2]_ the second::

    M_s = sigma_s / min sigma              sigma_s = sqrt(1e-7 + v_s)
    M_i = max(sigma_i / mean sigma, 1e-3)  sigma_i = sqrt(1e-7 + max(v_i, w^n v_s))

The share of v_s keeps coordinates whose first gradients happen to be small from too light masses.

References
----------
.. [1] Wenzel et al. (2020), How good is the Bayes posterior in deep neural networks really?
.. [2] Springenberg, Klein, Falkner & Hutter (2016), Bayesian optimization with robust Bayesian neural networks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bnn_ppl import updates

Average = dict[str, Tensor]  # `second_moment`; `weight`, that of all it has; and at gradient step `until` it stops


def begin(z: Tensor, until: int) -> Average:
    """An average of nothing yet."""
    return {"second_moment": torch.zeros_like(z), "weight": z.new_zeros(()), "until": torch.tensor(until)}


def averaged(average: Average, gradient: Tensor, step: int, decay: float) -> Average:
    """The average with the gradient of a step in it, before `until`."""
    if step >= int(average["until"]):
        return average
    second_moment = updates.moving_average(average["second_moment"], gradient * gradient, decay)
    weight = updates.moving_average(average["weight"], 1.0, decay)
    return average | {"second_moment": second_moment, "weight": weight}


def unbiased(average: Average) -> Tensor:
    """Mean squared gradient of each coordinate, 0 before there is a gradient."""
    weight = average["weight"]
    return average["second_moment"] / torch.where(weight > 0, weight, 1.0)


def masses(kind: str, average: Average, sizes: Sequence[int]) -> Tensor:
    """Mass of each coordinate, the same within a site if it goes by site; `sizes` has the coordinates of each."""
    squares, missing = unbiased(average), 1.0 - average["weight"]
    of_site = torch.cat([v.mean().expand(len(v)) for v in squares.split(list(sizes))])
    if kind == "adapt":
        sigma = torch.sqrt(1e-7 + of_site)
        return sigma / sigma.min()
    sigma = torch.sqrt(1e-7 + torch.maximum(squares, missing * of_site))
    return (sigma / sigma.mean()).clamp(min=1e-3)
