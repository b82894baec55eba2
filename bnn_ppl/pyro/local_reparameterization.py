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
from torch.utils import _pytree as pytree

from bnn_ppl.guide_sites import Sites, check_sites, chooser
from bnn_ppl.local_noise import MARK, UNMARKED, check_found, check_uses

_PRODUCTS = ("matmul", "mm", "bmm", "mv", "dot", "inner")
_BIASED = ("input", "weight", "bias")
_BIASED_LAYERS = ("linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)))
_KNOWN = f"x @ w, einsum, {', '.join((*_PRODUCTS, *_BIASED_LAYERS))}"
_IN_PLACE = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")
_SAME_ENTRIES = (
    *("T", "mT", "t", "transpose", "swapaxes", "permute", "movedim", "reshape", "view", "flatten", "unflatten"),
    *("squeeze", "unsqueeze", "contiguous", "clone", "to", "float", "double", "flip", "neg"),
)


def local_reparameterization(model: Callable, guide: Callable, *, sites: Sites = None) -> tuple[Callable, Callable]:
    """Give a model and its guide with noise in the outputs of layers instead of their weights.

    Parameters
    ----------
    model
        Pyro model, written in any way: layers are found as it runs, as matrix products and convolutions of a site of
        the guide with something else. In between, a weight may be reshaped, sliced and
        scaled by numbers.
    guide
        Guide that draws weights from normals, such as ``AutoNormal``, `AutoVariationalDropout`, `AutoVarianceNetwork`,
        or one written by hand whose normals do not depend on each other's draws. Other sites, those in
        plates, and normals that the model uses in other ways (biases), are drawn as ever.
    sites
        Sites whose noise goes to the outputs: names, or a callable of (name, shape); by default all that are in layers.

    Returns
    -------
    tuple
        Model and guide for ``SVI``. Predict with the guide itself.

    Raises
    ------
    ValueError
        For `sites` that is a string; when they run, if the guide draws no site from a normal of its own, as where all
        sites are cut from one vector, or the model has no layer with such a site.

    Warns
    -----
    UserWarning
        If a site is in several layers: their noise is drawn independently, as if each had weights of its own.

    Notes
    -----
    Where each weight enters one output of its layer for each row, as in dense networks, each row's expected log
    likelihood is that of the weights; under ``TraceMeanField_ELBO`` so is the ELBO. Elsewhere the outputs of a row are
    made independent, which is another approximate posterior than the guide's: in convolutions, in layers that a row
    passes at several positions, and in products such as ``x @ (u @ z)``. Leave weights that should not be treated so
    out of `sites`, and those on which the inputs of their own layer depend. The model's weights are a subclass of
    ``torch.Tensor`` that looks out for layers; recurrent layers of torch, its attention and its ``jit`` are not looked
    into.

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
    sites = check_sites(sites)

    @functools.wraps(guide, updated=())
    def marked(*args: Any, **kwargs: Any) -> Any:
        with _MarkNormals(sites) as mark:
            result = guide(*args, **kwargs)
        check_found(mark.normals, sites)
        return result

    setattr(marked, UNMARKED, guide)

    @functools.wraps(model, updated=())
    def local(*args: Any, **kwargs: Any) -> Any:
        with _HandOutWeights() as weights:
            result = model(*args, **kwargs)
        if weights.names:
            check_uses(weights.names, weights.uses, _KNOWN)
        return pytree.tree_map(lambda value: value.as_subclass(Tensor) if type(value) is _Weights else value, result)

    return local, marked


class _MarkNormals(Messenger):
    """Leave mean and scale with each site that is drawn from a normal, where `replay` hands them to the model.

    Pyro's own guides draw an auxiliary site, and give its value to the site itself.
    """

    def __init__(self, sites: Sites):
        super().__init__()
        self.chosen = chooser(sites)
        self.normals: dict[str, bool] = {}  # and whether they are chosen
        self.auxiliary: dict[int, tuple] = {}

    def _pyro_sample(self, msg: dict) -> None:
        base, moments = _base(msg["fn"]), None
        if isinstance(base, dist.Normal):
            moments = base.loc, base.scale
        elif isinstance(base, dist.Delta) and id(base.v) in self.auxiliary:
            moments = self.auxiliary[id(base.v)][1]
        # No vector from which the sites are cut, and no latent of rows, which would enter several outputs of its row.
        own = not (msg["infer"].get("is_auxiliary") or msg["is_observed"] or msg["cond_indep_stack"])
        if moments and own:
            self.normals[msg["name"]] = chosen = bool(self.chosen(msg["name"], tuple(msg["fn"].shape())))
            if chosen:
                msg["infer"] = msg["infer"] | {MARK: moments}

    def _pyro_post_sample(self, msg: dict) -> None:
        base = _base(msg["fn"])
        if msg["infer"].get("is_auxiliary") and isinstance(base, dist.Normal):
            self.auxiliary[id(msg["value"])] = msg["value"], (base.loc, base.scale)  # held, so that no other has its id


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
            msg["value"] = _Weights.of(msg["value"], mean, sd, msg["name"], self.uses)


class _Weights(Tensor):
    """A site, or some of its entries in another order or scale: a draw that knows the mean and sd of its entries."""

    mean_of: Tensor
    sd_of: Tensor  # of any sign
    site: str
    uses: Counter  # layers by site

    @staticmethod
    def of(draw: Tensor, mean: Tensor, sd: Tensor, site: str, uses: Counter) -> "_Weights":
        """Weights with these parts, of a site, which count the layers that they are in."""
        weights = draw.as_subclass(_Weights)
        weights.mean_of, weights.sd_of, weights.site, weights.uses = mean, sd, site, uses
        return weights

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch calls instead of a function of weights."""
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        args, kwargs = list(args), dict(kwargs or {})
        for key in _BIASED[len(args) :] if name in _BIASED_LAYERS else ():
            args.append(kwargs.pop(key, None))
        at = [i for i, value in enumerate(args) if isinstance(value, _Weights)]
        _check_kept(name, args, kwargs, at)
        with torch._C.DisableTorchFunctionSubclass():
            if operands := _operands(name, args, at):
                return _with_local_noise(func, args, kwargs, *operands)
            found = func(*args, **kwargs)
            if len(at) == 1 and _keeps_entries(name, args, at[0], found):
                weights = args[at[0]]
                mean, sd = (func(*_with(args, {at[0]: part}), **kwargs) for part in (weights.mean_of, weights.sd_of))
                return _Weights.of(found, mean, sd, weights.site, weights.uses)
        return found


def _with(args: list, changes: dict[int, Any]) -> list:
    return [changes.get(i, value) for i, value in enumerate(args)]


def _check_kept(name: str, args: list, kwargs: dict, at: list[int]) -> None:
    """Raise a ValueError where weights would be changed in place, of which their mean and sd know nothing."""
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
    if (in_place and 0 in at) or (at and kwargs.get("out") is not None):
        raise ValueError(
            f"site {args[at[0]].site!r} is changed or written in place ({name}), which local_reparameterization cannot "
            "follow: make a new tensor, such as w * mask, or leave the site out of sites="
        )


def _operands(name: str, args: list, at: list[int]) -> tuple[int, int] | None:
    """Which arguments of a layer are its weights and its inputs, or None for what is done with the draw."""
    if name in _BIASED_LAYERS:
        return (1, 0) if 1 in at and 0 not in at else None
    if name in _PRODUCTS and at in ([0], [1]):
        return at[0], 1 - at[0]
    if name == "einsum" and len(args) == 3 and at in ([1], [2]) and _keeps_inputs(args[0], at[0]):
        return at[0], 3 - at[0]
    return None


def _keeps_inputs(equation: str, at: int) -> bool:
    """Whether each axis of the inputs is summed with the weights' or kept, so that outputs are sums over weights."""
    terms, _, output = equation.replace(" ", "").partition("->")
    operands = terms.split(",")
    weights, inputs = operands[at - 1], operands[2 - at]
    return "->" in equation and "." not in equation and set(inputs) <= set(weights + output)


def _with_local_noise(func: Callable, args: list, kwargs: dict, weights: int, inputs: int) -> Tensor:
    """The outputs of a layer, with noise of their own."""
    held = args[weights]
    held.uses[held.site] += 1
    mean = func(*_with(args, {weights: held.mean_of}), **kwargs)
    squares = {weights: held.sd_of.square(), inputs: args[inputs].square()}
    if func.__name__ in _BIASED_LAYERS:
        squares[2] = None
    variance = func(*_with(args, squares), **kwargs)
    sd = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()  # the slope of the root at 0 is infinite
    return torch.addcmul(mean, sd, _noise_like(mean))


def _noise_like(outputs: Tensor) -> Tensor:
    """Standard normal noise in the same order in memory: made in the usual one, which torch fills ten times faster."""
    order = sorted(range(outputs.ndim), key=outputs.stride, reverse=True)
    noise = torch.randn([outputs.shape[axis] for axis in order], dtype=outputs.dtype, device=outputs.device)
    return noise.permute([order.index(axis) for axis in range(outputs.ndim)])


def _keeps_entries(name: str, args: list, at: int, found: Any) -> bool:
    """Whether a function gives entries of its argument in another order or scale, each once."""
    if name in ("mul", "div"):
        return (name == "mul" or at == 0) and isinstance(args[1 - at], int | float)  # tensors may depend on the weights
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return all(i is None or i is ... or isinstance(i, int | slice) for i in index)
    return name in _SAME_ENTRIES
