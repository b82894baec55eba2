"""Which weights are mostly noise, and networks without them.

A weight of mean mu and standard deviation sigma under the posterior has::

    alpha = sigma^2 / mu^2,    signal to noise = |mu| / sigma = alpha^(-1/2)

Where variational dropout takes log alpha above 3, that is alpha above 20, the weight is put to 0 [1]_. Pruning by the
signal-to-noise ratio [2]_ [3]_ is the same with another threshold.

References
----------
.. [1] Molchanov, Ashukha & Vetrov (2017), Variational dropout sparsifies deep neural networks.
.. [2] Graves (2011), Practical variational inference for neural networks.
.. [3] Blundell et al. (2015), Weight uncertainty in neural networks.
"""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from bnn_ppl.diagnostics.checks import check_finite, place


def log_alpha(draws: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Logarithm of the variance over the squared mean of each weight, from draws.

    Parameters
    ----------
    draws
        By site, shapes (draws, ...), at least two: ``mcmc.get_samples()`` of either host, whose chains follow each
        other in one axis, or ``sample_posterior`` of a guide.

    Returns
    -------
    dict of numpy.ndarray
        By site, shapes (...): inf where the mean is 0, -inf where all draws are equal.

    Raises
    ------
    TypeError
        If `draws` is no dict of arrays by site, or is a group of ArviZ's, with an axis for the chains.
    ValueError
        If there are no sites, no weights or fewer than two draws, a value is not finite, or a weight is 0 in all draws.

    Notes
    -----
    The mean of S independent draws is off by the order sigma / sqrt(S), so that a large alpha comes out near S: take
    many times more draws than the threshold on alpha. Where chains differ by a symmetry of the network, such as the
    signs and the order of its hidden units, the mean over them says little. `AutoVariationalDropout` has a `log_alpha`
    of its own, which is exact.

    Examples
    --------
    >>> log_alpha(mcmc.get_samples())["w0"]
    >>> log_alpha(guide.sample_posterior(random.key(0), params, sample_shape=(1000,)))
    """
    labelled = (xr.DataArray, xr.Dataset, xr.DataTree)
    if isinstance(draws, Mapping) and any(isinstance(values, labelled) for values in draws.values()):
        raise TypeError(
            f"draws must be a dict of arrays by site, of shape (draws, ...), got {type(draws).__name__}, whose arrays "
            "have an axis for the chains: give mcmc.get_samples() in place of what to_arviz makes"
        )
    found = {}
    for site, values in _by_site("draws", draws, "give mcmc.get_samples()").items():
        if values.ndim == 0 or len(values) < 2:
            raise ValueError(
                f"draws of site {site!r} must be at least 2, in the shape (draws, ...), got {values.shape}: take more"
            )
        check_finite(f"draws of site {site!r}", values)
        first = values[0].astype(np.float64)  # from which equal draws have no distance, whatever the rounding
        mean = first + sum(draw - first for draw in values) / len(values)
        variance = sum(np.square(draw - mean) for draw in values) / (len(values) - 1)
        nothing = (mean == 0) & (variance == 0)
        if nothing.any():
            raise ValueError(
                f"draws of site {site!r} are all 0{place(nothing)}, where alpha is 0 / 0: leave such weights out"
            )
        with np.errstate(divide="ignore"):
            found[site] = np.asarray(np.log(variance) - 2 * np.log(np.abs(mean)))
    return found


def signal_to_noise(log_alpha: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Absolute mean of each weight over its standard deviation, exp(-log alpha / 2).

    Parameters
    ----------
    log_alpha
        By site, from a guide's `log_alpha` or from `bnn_ppl.diagnostics.log_alpha`.

    Returns
    -------
    dict of numpy.ndarray
        By site, in the shapes given: 0 where log alpha is inf, inf where it is -inf.

    Raises
    ------
    TypeError
        If `log_alpha` is no dict of arrays by site.
    ValueError
        If there are no sites or no weights, or a value is NaN.
    """
    return {site: np.asarray(np.exp(-0.5 * values)) for site, values in check_log_alpha(log_alpha).items()}


def sparsity(log_alpha: Mapping[str, Any], *, threshold: float = 3.0) -> Any:
    """How many weights are left where those with a log alpha above a threshold are pruned.

    Parameters
    ----------
    log_alpha
        By site, from a guide's `log_alpha` or from `bnn_ppl.diagnostics.log_alpha`.
    threshold
        The largest log alpha of a weight that is kept; the published one is 3, alpha = 20.

    Returns
    -------
    pandas.DataFrame
        A row for each `part` (``"all"``, sites): the number of `weights` and of those `kept`, the share `pruned`, from
        0 to 1, and the `compression`, weights over weights kept, which is inf where none is kept.

    Raises
    ------
    TypeError
        If `log_alpha` is no dict of arrays by site.
    ValueError
        If there are no sites or no weights, a value is NaN, or `threshold` is no finite number.

    Examples
    --------
    >>> table = sparsity(guide.log_alpha(params))  # guide.log_alpha() on Pyro
    >>> print(table)
    >>> table.loc["all", "compression"]
    """
    _check_threshold(threshold)
    by_site = check_log_alpha(log_alpha)
    weights = np.array([values.size for values in by_site.values()])
    kept = np.array([np.count_nonzero(values <= threshold) for values in by_site.values()])
    weights, kept = (np.array([counts.sum(), *counts]) for counts in (weights, kept))
    compression = np.divide(weights, kept, out=np.full(len(kept), np.inf), where=kept > 0)
    columns = {"weights": weights, "kept": kept, "pruned": 1 - kept / weights, "compression": compression}
    return xr.Dataset(
        {n: ("part", column) for n, column in columns.items()}, {"part": ["all", *by_site]}
    ).to_dataframe()


def prune(values: Mapping[str, Any], log_alpha: Mapping[str, Any], *, threshold: float = 3.0) -> dict[str, np.ndarray]:
    """Weights with those put to 0 whose log alpha is above a threshold, as one draw that `predict` takes.

    Parameters
    ----------
    values
        By site, such as ``guide.median(params)``, in the shapes of the model's sites.
    log_alpha
        By site, in the same shapes, from a guide's `log_alpha` or from `bnn_ppl.diagnostics.log_alpha`. Sites of
        `values` that it leaves out are not pruned.
    threshold
        The largest log alpha of a weight that is kept; the published one is 3, alpha = 20.

    Returns
    -------
    dict of numpy.ndarray
        All sites of `values`, shapes (1, ...), in the dtypes given: a single draw, on the CPU.

    Raises
    ------
    TypeError
        If `values` or `log_alpha` is no dict of arrays by site.
    ValueError
        If one has no sites or no weights, they do not fit together, a log alpha is NaN, or `threshold` is no finite
        number.

    Examples
    --------
    >>> pruned = prune(guide.median(params), guide.log_alpha(params))  # without params on Pyro
    >>> predict(pruned, x_test, model=model)["mean"]
    """
    _check_threshold(threshold)
    weights = _by_site("values", values, "give guide.median(params), on Pyro guide.median()")
    by_site = check_log_alpha(log_alpha)
    unknown = [site for site in by_site if site not in weights]
    if unknown:
        raise ValueError(
            f"log_alpha has the sites {unknown}, and values has {list(weights)}: give the weights of each site, as "
            "guide.median(params) has them"
        )
    for site, logs in by_site.items():
        if logs.shape != weights[site].shape:
            raise ValueError(
                f"log_alpha of site {site!r} has the shape {logs.shape}, and values {weights[site].shape}: give "
                "the weights themselves, without an axis of draws, and a log alpha for each"
            )
    pruned = {site: np.array(value)[None] for site, value in weights.items()}
    for site, logs in by_site.items():
        pruned[site][0, logs > threshold] = 0
    return pruned


def check_log_alpha(log_alpha: Any) -> dict[str, np.ndarray]:
    """Log alpha by site in float64; a TypeError or ValueError unless there is a number for each weight, or inf."""
    found = _by_site("log_alpha", log_alpha, "give guide.log_alpha(params), on Pyro guide.log_alpha()")
    for site, values in found.items():
        bad = np.isnan(values)
        if bad.any():
            raise ValueError(
                f"log_alpha of site {site!r} has {bad.sum()} NaN values, the first{place(bad)}: where mean and "
                "standard deviation are both 0, put it to inf to prune the weight, and else check the training"
            )
    return {site: values.astype(np.float64) for site, values in found.items()}


def _check_threshold(threshold: Any) -> None:
    number = isinstance(threshold, numbers.Real) and not isinstance(threshold, bool)
    if not number or not math.isfinite(threshold):
        raise ValueError(f"threshold must be a finite number, got {threshold!r}: the published one is 3")


def _by_site(name: str, mapping: Any, remedy: str) -> dict[str, np.ndarray]:
    """NumPy arrays of those of any backend; an error unless there are sites and none is empty."""
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{name} must be a dict of arrays by site, got {type(mapping).__name__}: {remedy}")
    if not mapping:
        raise ValueError(f"{name} must have at least one site, got {mapping!r}: {remedy}")
    found = {}
    for site, given in mapping.items():
        try:  # tensors of torch may need a gradient, or be on a GPU
            values = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
        except ValueError:  # lists of several lengths
            values = None
        if values is None or values.dtype.kind in "OUSMmc":
            raise TypeError(
                f"{name} must be a dict of arrays of numbers by site, and {name}[{site!r}] is a "
                f"{type(given).__name__}: {remedy}"
            )
        found[site] = values
        if not values.size:
            raise ValueError(f"{name} of site {site!r} is empty, shape {values.shape}: leave the site out")
    return found
