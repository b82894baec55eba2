"""Local reparameterisation: noise in the outputs of a layer instead of its weights [1]_.

Where a guide draws w_ij ~ N(mu_ij, sigma_ij^2) independently, a row x has the outputs::

    y_j = sum_i x_i w_ij  ~  N(sum_i x_i mu_ij, sum_i x_i^2 sigma_ij^2)

which are drawn directly, for each row by itself. Rows do not share their noise then, so that it averages out over a
minibatch: gradients have a lower variance, with the same expectation. A convolution draws each pixel of its output
by itself, as published [2]_: the law of one pixel stays, neighbouring ones lose their correlation.

References
----------
.. [1] Kingma, Salimans & Welling (2015), Variational dropout and the local reparameterization trick.
.. [2] Molchanov, Ashukha & Vetrov (2017), Variational dropout sparsifies deep neural networks.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from pyro import distributions as dist
from pyro.poutine.messenger import Messenger
from torch import Tensor

from bnn_ppl.local_noise import MARK, check_found, check_uses

_PRODUCTS = ("matmul", "mm", "bmm", "mv", "dot", "inner")
_BIASED = ("input", "weight", "bias")
_BIASED_LAYERS = ("linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)))
_SAME_ENTRIES = (
    *("T", "mT", "t", "transpose", "swapaxes", "permute", "movedim", "reshape", "view", "flatten", "unflatten"),
    *("squeeze", "unsqueeze", "contiguous", "clone", "to", "float", "double", "flip", "neg"),
)


def local_reparameterization(model: Callable, guide: Callable) -> tuple[Callable, Callable]:
    """Give a model and its guide with noise in the outputs of layers instead of their weights.

    Parameters
    ----------
    model
        Pyro model, written in any way: layers are found as it runs, as matrix products and convolutions of a site of
        the guide with something else. In between, a weight may be reshaped, sliced and scaled.
    guide
        Guide that draws weights from normals, such as ``AutoNormal``, `AutoVariationalDropout`, `AutoVarianceNetwork`,
        or one written by hand. Other sites, and normals that the model uses in other ways (biases), are drawn as ever.

    Returns
    -------
    tuple
        Model and guide for ``SVI``. Predict with the guide itself.

    Raises
    ------
    ValueError
        When they run: if the guide draws no site from a normal, or the model has no layer with such a site.

    Warns
    -----
    UserWarning
        If a site is in several layers: their noise is drawn independently, as if each had weights of its own.

    Notes
    -----
    For dense layers each row's expected log likelihood is that of the weights; under ``TraceMeanField_ELBO`` so is the
    ELBO. In convolutions, and in layers that one row passes at several positions, the noise of positions is
    independent, another approximate posterior than the guide's. The model's weights are a subclass of
    ``torch.Tensor`` that looks out for layers; recurrent layers of torch and its ``jit`` are not looked into.

    References
    ----------
    Kingma, Salimans & Welling (2015), Variational dropout and the local reparameterization trick.

    Examples
    --------
    >>> guide = AutoNormal(model)
    >>> svi = SVI(*local_reparameterization(model, guide), Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    >>> losses = [svi.step(x, y) for _ in range(10_000)]
    >>> predict(guide, x_test, model=model)
    """

    @functools.wraps(guide, updated=())
    def marked(*args: Any, **kwargs: Any) -> Any:
        with _MarkNormals() as mark:
            result = guide(*args, **kwargs)
        check_found(mark.found)
        return result

    @functools.wraps(model, updated=())
    def local(*args: Any, **kwargs: Any) -> Any:
        with _HandOutWeights() as weights:
            result = model(*args, **kwargs)
        if weights.names:
            check_uses(weights.names, weights.uses)
        return result

    return local, marked


class _MarkNormals(Messenger):
    """Leave mean and scale with each site that is drawn from a normal, where `replay` hands them to the model.

    Pyro's own guides draw an auxiliary site, and give its value to the site itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.normals: dict[int, tuple] = {}

    def _pyro_sample(self, msg: dict) -> None:
        base, moments = _base(msg["fn"]), None
        if isinstance(base, dist.Normal):
            moments = base.loc, base.scale
        elif isinstance(base, dist.Delta) and id(base.v) in self.normals:
            moments = self.normals[id(base.v)][1]
        if moments and not msg["is_observed"]:
            msg["infer"] = msg["infer"] | {MARK: moments}
            self.found.append(msg["name"])

    def _pyro_post_sample(self, msg: dict) -> None:
        if msg["infer"].get("is_auxiliary") and MARK in msg["infer"]:
            self.normals[id(msg["value"])] = msg["value"], msg["infer"][MARK]  # held, so that no other has its id


def _base(fn: Any) -> Any:
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn


class _HandOutWeights(Messenger):
    """Give the model, inside all other handlers, tensors that make noise in the outputs of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.uses: Counter = Counter()

    def _pyro_post_sample(self, msg: dict) -> None:
        if MARK in msg["infer"] and not msg["is_observed"]:
            mean, sd = (part.expand_as(msg["value"]) for part in msg["infer"][MARK])
            self.names.append(msg["name"])
            msg["value"] = _Weights.of(msg["value"], mean, sd, functools.partial(self._count, msg["name"]))

    def _count(self, name: str) -> None:
        self.uses[name] += 1


class _Weights(Tensor):
    """A site, or some of its entries in another order or scale: a draw that knows the mean and sd of its entries."""

    mean_of: Tensor
    sd_of: Tensor  # of any sign
    count: Callable[[], None]

    @staticmethod
    def of(draw: Tensor, mean: Tensor, sd: Tensor, count: Callable[[], None]) -> "_Weights":
        """Weights with these parts; `count` is called for each layer that they are in."""
        weights = draw.as_subclass(_Weights)
        weights.mean_of, weights.sd_of, weights.count = mean, sd, count
        return weights

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch calls instead of a function of weights."""
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        args, kwargs = list(args), dict(kwargs or {})
        for key in _BIASED[len(args) :] if name in _BIASED_LAYERS else ():
            args.append(kwargs.pop(key, None))
        at = [i for i, value in enumerate(args) if isinstance(value, _Weights)]
        with torch._C.DisableTorchFunctionSubclass():
            if operands := _operands(name, args, at):
                return _with_local_noise(func, args, kwargs, *operands)
            found = func(*args, **kwargs)
            if len(at) == 1 and _keeps_entries(name, args, at[0], found):
                weights = args[at[0]]
                mean, sd = (func(*_with(args, {at[0]: part}), **kwargs) for part in (weights.mean_of, weights.sd_of))
                return _Weights.of(found, mean, sd, weights.count)
        return found


def _with(args: list, changes: dict[int, Any]) -> list:
    return [changes.get(i, value) for i, value in enumerate(args)]


def _operands(name: str, args: list, at: list[int]) -> tuple[int, int] | None:
    """Which arguments of a layer are its weights and its inputs, or None for what is done with the draw."""
    if name in _BIASED_LAYERS:
        return (1, 0) if 1 in at and 0 not in at else None
    if name in _PRODUCTS and at in ([0], [1]):
        return at[0], 1 - at[0]
    if name == "einsum" and len(args) == 3 and at in ([1], [2]):
        return at[0], 3 - at[0]
    return None


def _with_local_noise(func: Callable, args: list, kwargs: dict, weights: int, inputs: int) -> Tensor:
    """The outputs of a layer, with noise of their own."""
    held = args[weights]
    held.count()
    mean = func(*_with(args, {weights: held.mean_of}), **kwargs)
    squares = {weights: held.sd_of.square(), inputs: args[inputs].square()}
    if func.__name__ in _BIASED_LAYERS:
        squares[2] = None
    variance = func(*_with(args, squares), **kwargs)
    sd = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()  # the slope of the root at 0 is infinite
    return torch.addcmul(mean, sd, torch.randn_like(mean))


def _keeps_entries(name: str, args: list, at: int, found: Any) -> bool:
    """Whether a function gives entries of its argument in another order or scale, each once."""
    if name in ("mul", "div"):
        return (name == "mul" or at == 0) and found.shape == args[at].shape
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return not any(isinstance(i, Tensor | list) for i in index)
    return name in _SAME_ENTRIES
