"""Data, priors and observations that the Pyro models share."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch

from ..checks import check_data_shapes


def check_data(
    x: Any,
    y: Any,
    subsample_size: int | None,
    num_classes: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> tuple[Any, Any]:
    """The data, once their shapes (and for `num_classes` the labels' dtype) are found good.

    Parameters
    ----------
    x : torch.Tensor, shape (N, D), or (N, *image_shape) where that is given
    y : torch.Tensor, shape (N,), or None
    subsample_size : int or None
    num_classes : int or None
        For classification: labels must be integers. Their range 0, ..., num_classes - 1 is left to Pyro's own
        validation of the density (on by default): a look at the values would wait for the device each time.
    image_shape : tuple of int, or None
        Axes of one image in the backend's order; None for rows of D numbers.

    Raises
    ------
    ValueError
        Naming the argument, its value and the remedy.
    """
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, torch.Tensor) and not (name == "y" and value is None):
            raise ValueError(f"{name} is a {type(value).__name__}: give a tensor, torch.as_tensor({name}).")
    check_data_shapes(x.shape, None if y is None else y.shape, subsample_size, image_shape)
    if y is not None and num_classes is not None and (y.is_floating_point() or y.is_complex()):
        raise ValueError(f"y has dtype {y.dtype}: give integer labels, for instance y.long().")
    return x, y


def float_like(x: Any) -> Any:
    """A scalar on the device of `x`, with its dtype, or torch's default float for integers."""
    return x.new_zeros((), dtype=x.dtype if x.is_floating_point() else torch.get_default_dtype())


def normal_prior(scale: float, shape: tuple[int, ...], like: Any) -> Any:
    """Independent N(0, scale^2) of the given event shape, with the dtype and device of the zero `like`."""
    one = dist.Normal(like, like.new_full((), scale))
    return one.expand(shape).to_event(len(shape))


def noise_prior(scale: float, like: Any) -> Any:
    """Half-normal prior of a noise scale, with the dtype and device of `like`."""
    return dist.HalfNormal(like.new_full((), scale))


def minibatch(x: Any, y: Any, like: Any) -> tuple[Any, Any]:
    """The enclosing plate's rows of the data, `x` with `like`'s dtype (cast last: x may be a large uint8)."""
    x = pyro.subsample(x, event_dim=x.ndim - 1).to(like.dtype)
    return x, None if y is None else pyro.subsample(y, event_dim=0)


def observe_values(location: Any, noise_scale: Any, y: Any) -> Any:
    """The site ``y`` of a regression; sampled where `y` is None."""
    obs = None if y is None else y.to(location.dtype)
    if not isinstance(noise_scale, torch.Tensor):
        noise_scale = location.new_full((), noise_scale)  # torch would copy a number from the CPU in each step
    return pyro.sample("y", dist.Normal(location, noise_scale), obs=obs)


def observe_binary(logits: Any, y: Any) -> Any:
    """The site ``y`` of a classification in two, from logits of shape (B,); sampled where `y` is None."""
    obs = None if y is None else y.to(logits.dtype)
    return pyro.sample("y", dist.Bernoulli(logits=logits), obs=obs)


def observe_labels(logits: Any, y: Any) -> Any:
    """The site ``y`` of a classification, from logits of shape (B, classes); sampled where `y` is None."""
    obs = None if y is None else y.long()
    return pyro.sample("y", dist.Categorical(logits=logits), obs=obs)


def matmul(x: Any, weights: Any) -> Any:
    """``x @ weights``, shape (B, fan_out), or (draws, B, fan_out) where Pyro runs many draws at once.

    Vectorised guides give weights of shape (draws, 1, fan_in, fan_out), the 1 being the place of the data
    plate, which ``x`` fills. ``Predictive(parallel=True)`` leaves that place out of the draws of a chain.
    """
    return x @ (weights.squeeze(-3) if weights.dim() > 3 else weights)


def affine(x: Any, weights: Any, bias: Any) -> Any:
    """``x @ weights + bias`` with the shapes of :func:`matmul`."""
    return matmul(x, weights) + (bias.unsqueeze(-2) if weights.dim() == 3 else bias)
