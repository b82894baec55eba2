"""Data, priors and observations that the NumPyro models share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from ..checks import check_data_shapes


def check_data(
    x: Any,
    y: Any,
    subsample_size: int | None,
    num_classes: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> tuple[Any, Any]:
    """Data as JAX arrays, once their shapes (and for `num_classes` the labels) are found good.

    Parameters
    ----------
    x : array_like, shape (N, D), or (N, *image_shape) where that is given
    y : array_like, shape (N,), or None
    subsample_size : int or None
    num_classes : int or None
        For classification: labels must be integers in 0, ..., num_classes - 1. Traced labels have no values
        to look at; then only their dtype is checked.
    image_shape : tuple of int, or None
        Axes of one image in the backend's order; None for rows of D numbers.

    Raises
    ------
    ValueError
        Naming the argument, its value and the remedy.
    """
    given, x = y, jnp.asarray(x)
    y = None if y is None else jnp.asarray(y)
    check_data_shapes(x.shape, None if y is None else y.shape, subsample_size, image_shape)
    if y is not None and num_classes is not None:
        if not (jnp.issubdtype(y.dtype, jnp.integer) or y.dtype == bool):
            raise ValueError(f"y has dtype {y.dtype}: give integer labels, for instance y.astype(int).")
        if not isinstance(given, jax.core.Tracer):
            labels = np.asarray(given)  # NumPy, for under jit any JAX operation would be traced
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= num_classes:
                raise ValueError(
                    f"y has labels from {low} to {high} with num_classes={num_classes}: "
                    f"give labels 0 to {num_classes - 1}, or another num_classes."
                )
    return x, y


def float_dtype(x: Any) -> Any:
    """Dtype of the priors: that of `x`, or JAX's default float for integers."""
    return x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.result_type(float)


def normal_prior(scale: float, shape: tuple[int, ...], dtype: Any) -> Any:
    """Independent N(0, scale^2) of the given event shape."""
    one = dist.Normal(jnp.zeros((), dtype), jnp.asarray(scale, dtype))
    return one.expand(shape).to_event(len(shape))


def noise_prior(scale: float, dtype: Any) -> Any:
    """Half-normal prior of a noise scale."""
    return dist.HalfNormal(jnp.asarray(scale, dtype))


def minibatch(x: Any, y: Any, dtype: Any) -> tuple[Any, Any]:
    """The enclosing plate's rows of the data, `x` as `dtype` (cast last: x may be a large uint8)."""
    x = numpyro.subsample(x, event_dim=x.ndim - 1).astype(dtype)
    return x, None if y is None else numpyro.subsample(y, event_dim=0)


def observe_values(location: Any, noise_scale: Any, y: Any) -> Any:
    """The site ``y`` of a regression; sampled where `y` is None."""
    obs = None if y is None else y.astype(location.dtype)
    return numpyro.sample("y", dist.Normal(location, noise_scale), obs=obs)


def observe_binary(logits: Any, y: Any) -> Any:
    """The site ``y`` of a classification in two, from logits of shape (B,); sampled where `y` is None."""
    obs = None if y is None else y.astype(logits.dtype)
    return numpyro.sample("y", dist.Bernoulli(logits=logits), obs=obs)


def observe_labels(logits: Any, y: Any) -> Any:
    """The site ``y`` of a classification, from logits of shape (B, classes); sampled where `y` is None."""
    obs = None if y is None else y.astype(jnp.int32)
    return numpyro.sample("y", dist.Categorical(logits=logits), obs=obs)
