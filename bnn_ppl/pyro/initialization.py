"""Where chains start: near the prior's centre, with the spread that networks are initialised with.

The hosts' default, uniform on (-2, 2) in unconstrained space, saturates a network of any width. Here each
unconstrained coordinate is the prior's centre plus s z with z standard normal and

* s = min(prior standard deviation, 1 / sqrt(fan_in)) on an unbounded site, where fan_in is the longer axis of a
  vector or matrix, and the product of all axes but the first of a convolution's kernel;
* s = 0.1 in unconstrained coordinates on any other site.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from bnn_ppl.layout import check_start_value

_MEDIAN_DRAWS = 15


def init_to_prior_center(site: dict | None = None) -> Any:
    """Pyro init strategy: the prior's centre plus fan-in sized noise.

    Parameters
    ----------
    site
        A Pyro site message; left out, the strategy itself is returned, as the host's strategies do.

    Returns
    -------
    Tensor
        The start value, in the user's coordinates, of a continuous latent site.
    """
    if site is None:
        return init_to_prior_center
    prior = site["fn"]
    with torch.no_grad():
        transform = biject_to(prior.support)
        center = _center(prior, transform)
        return transform(center + _spread(prior, center) * torch.randn_like(center))


def _center(prior: Any, transform: Any) -> Tensor:
    """Unconstrained prior mean; the median of draws where the mean is undefined; 0 for an improper prior."""
    try:
        from_mean = transform.inv(1.0 * prior.mean.expand(prior.shape()))
    except NotImplementedError:
        from_mean = transform.inv(torch.zeros(prior.shape())) * math.nan
    known = torch.isfinite(from_mean)
    if known.all():
        return from_mean
    try:
        from_draws = transform.inv(prior.sample((_MEDIAN_DRAWS,))).median(0).values
    except NotImplementedError:
        from_draws = torch.zeros_like(from_mean)
    return torch.where(known, from_mean, from_draws)


def _spread(prior: Any, center: Tensor) -> Tensor | float:
    support = prior.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is not constraints.real:
        return 0.1
    shape = prior.shape()
    fan_in = math.prod(shape[1:]) if len(shape) > 2 else max(shape, default=1)
    widest = torch.full_like(center, max(fan_in, 1) ** -0.5)
    try:
        deviation = prior.variance.expand(shape).sqrt()
    except NotImplementedError:
        return widest
    return torch.where(deviation < widest, deviation, widest)


def as_strategy(init_strategy: Callable | Mapping[str, Tensor] | None) -> Callable:
    """A strategy; values by site become one that starts the other sites near the prior's centre."""
    if init_strategy is None:
        return init_to_prior_center
    if isinstance(init_strategy, Mapping):
        return partial(_init_to_given, {name: _as_start(value) for name, value in init_strategy.items()})
    return init_strategy


def _as_start(value: Any) -> Tensor:
    """A tensor as it is, and numbers and NumPy arrays, of whatever type, in torch's default type."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.get_default_dtype())
    return value.detach() if value.is_floating_point() else value.to(torch.get_default_dtype())


def _init_to_given(values: Mapping[str, Tensor], site: dict) -> Tensor:
    name = site["name"]
    if name not in values:
        return init_to_prior_center(site)
    check_start_value(name, values[name].shape, site["fn"].shape())
    support = site["fn"].support
    if not support.check(values[name]).all():
        raise ValueError(
            f"init_strategy has a value of site {name!r} that is not in its support, {support}: give one in the user's "
            "coordinates"
        )
    return values[name]
