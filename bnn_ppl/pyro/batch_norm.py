r"""Running statistics of batch normalisation, for weights that were averaged or drawn.

The running averages of a layer belong to the weights of the last training steps; others need their own. With
:math:`s_i` the mean and the unbiased variance of a layer's inputs in batch i of :math:`b_i` rows, where all layers
before normalise by the same batch, one pass through the training data gives

.. math::
    s \leftarrow s + \frac{b_i}{n + b_i} (s_i - s), \quad n \leftarrow n + b_i, \qquad
    s = \frac{\sum_i b_i s_i}{\sum_i b_i}

References
----------
- P. Izmailov et al., *Averaging Weights Leads to Wider Optima and Better Generalization*, UAI 2018.
- W. Maddox et al., *A Simple Baseline for Bayesian Uncertainty in Deep Learning*, NeurIPS 2019.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger, _Subsample
from torch import Tensor
from torch.nn.modules import module as hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from bnn_ppl import batch_norm
from bnn_ppl.pyro.results import HoldParams


def update_batch_norm(
    model: Callable,
    draw: Mapping[str, Any],
    batches: Iterable,
    *,
    params: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Compute the running statistics of batch normalisation anew, for one value of the weights.

    For averaged weights, and for each draw of them, before predictions. The statistics are written into the network,
    as ``torch.optim.swa_utils.update_bn`` does, with batches that count by their rows.

    Parameters
    ----------
    model
        A Pyro model that calls a torch network with layers such as ``torch.nn.BatchNorm1d``: by
        ``random_torch_module``, by ``pyro.module``, or being a ``PyroModule``.
    draw
        One value for each latent site, in the user's coordinates, of the site's shape; such as ``guide.median()``.
        Other names are ignored.
    batches
        One pass through the training data: an iterable, such as a ``DataLoader``, of batches of the model's arguments
        as in training. A tuple or list is positional, a dict by keyword, an array the only argument. A batch has the
        rows of its first array. A data plate may be subsampled: it then holds the rows of the batch.
    params
        Values of ``param`` sites by name. By default those of Pyro's parameter store.
    **kwargs
        Further arguments of the model, the same for all batches.

    Returns
    -------
    dict of str to torch.Tensor
        Copies of the new buffers, ``{"1.running_mean": (features,), "1.running_var": (features,),
        "1.num_batches_tracked": ()}``, to come back to with ``network.load_state_dict(statistics, strict=False)``.

    Raises
    ------
    ValueError
        If the model runs no layer of batch normalisation, or one with ``track_running_stats=False``, or makes it; if
        there is no batch; if `draw` lacks a latent site, or has values of another shape; if statistics are not finite.
        After any error the network is as it was.

    Notes
    -----
    Layers of batch normalisation run in training mode, all others in the mode that they are in: after
    ``network.eval()``, which predictions need too, dropout is off. All modes and the random state stay as they were.

    Examples
    --------
    >>> network.eval()
    >>> update_batch_norm(model, guide.median(), train_loader)
    >>> predict(guide, x_test, model=model, scheme="deterministic")

    Draws that are predicted each with its own statistics, as SWAG asks for:

    >>> total = 0.0
    >>> for s in range(num_draws):
    ...     draw = {name: value[s] for name, value in draws.items()}
    ...     update_batch_norm(model, draw, train_loader)
    ...     one = {name: value[None] for name, value in draw.items()}
    ...     total = total + predict(one, x_test, model=model)["probabilities"]
    >>> probabilities = total / num_draws
    """
    params = {} if params is None else params
    batch_norm.check_arguments(model, draw, batches, params)
    first, batches = batch_norm.with_first(batches)
    values = {name: torch.as_tensor(value) for name, value in draw.items()}
    gpus = {leaf.device for leaf in pytree.tree_leaves((values, first)) if getattr(leaf, "is_cuda", False)}
    with torch.no_grad(), torch.random.fork_rng(list(gpus)), pyro.validation_enabled(False):
        layers = _look(model, values, params, first, kwargs)
        with _averages(layers) as averages:
            for batch in batches:
                averages.rows = batch_norm.number_of_rows(pytree.tree_leaves(batch))
                try:
                    _run(model, _Values(values), params, batch, kwargs)
                except ValueError as error:
                    if averages.rows == 1:
                        error.add_note("a batch has 1 row, which has no variance: leave it out, or join it to another")
                    raise
            averages.write(layers)
    named = ((f"{name}.{key}", b) for name, layer in layers.items() for key, b in layer.named_buffers())
    return {key.removeprefix("."): buffer.clone() for key, buffer in named}


class _Values(Messenger):
    """Give latent sites their values where these fit, and note the shapes of the sites."""

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__()
        self.values = values
        self.shapes: dict[str, tuple[int, ...]] = {}

    def _pyro_sample(self, msg: dict) -> None:
        if msg["is_observed"] or isinstance(msg["fn"], _Subsample):
            return
        shape = self.shapes[msg["name"]] = tuple(msg["fn"].shape())
        value = self.values.get(msg["name"])
        if value is not None and tuple(value.shape) == shape:
            msg["value"], msg["done"] = value, True


@contextmanager
def _plates_hold(rows: int) -> Iterator[None]:
    """Data plates with the rows of a batch, also if they state another number."""
    original = SubsampleMessenger._subsample

    def of_batch(name: str, size: Any = None, wanted: Any = None, index: Any = None, *where: Any) -> tuple:
        count = None if size is None else batch_norm.rows_of_plate(size, wanted, rows)
        if count is not None and index is None:
            wanted, index = None, torch.arange(count, device=where[-1] if where else None)
        return original(name, size, wanted, index, *where)

    SubsampleMessenger._subsample = staticmethod(of_batch)
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(original)


def _run(model: Callable, values: _Values, params: Mapping, batch: Any, kwargs: Mapping) -> None:
    args, keywords = batch_norm.arguments(batch, kwargs)
    with (
        poutine.block(),
        HoldParams(params),
        values,
        _plates_hold(batch_norm.number_of_rows(pytree.tree_leaves(batch))),
    ):
        model(*args, **keywords)


@contextmanager
def _before_each_layer(visit: Callable[[str, _BatchNorm], None]) -> Iterator[None]:
    """Call a function of each layer of batch normalisation, and its name in the network, before it runs."""
    running: list[torch.nn.Module] = []

    def enter(module: torch.nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling():  # which cannot trace a hook such as this
            return
        running.append(module)
        if isinstance(module, _BatchNorm):
            visit(next(name for name, part in running[0].named_modules() if part is module), module)

    def leave(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            running.pop()

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks")
        stack.callback(hooks.register_module_forward_pre_hook(enter).remove)
        stack.callback(hooks.register_module_forward_hook(leave, always_call=True).remove)
        yield


@contextmanager
def warns_of_statistics(stacklevel: int = 4) -> Iterator[None]:
    """Warn, of a model that is predicted, where batch normalisation has no statistics of the training data."""
    of_batch: dict[str, None] = {}
    initial: dict[str, None] = {}

    def visit(name: str, layer: _BatchNorm) -> None:
        if layer.training or layer.running_mean is None:
            of_batch[name] = None
        elif not layer.num_batches_tracked and not layer.running_mean.any():
            initial[name] = None

    with _before_each_layer(visit):
        yield
    remedy = "then update_batch_norm(model, draw, batches), for averaged weights or for each draw"
    if of_batch:
        warnings.warn(
            f"the layers of batch normalisation {list(of_batch)} normalise each batch of rows by itself, being in "
            "training mode or without running statistics, so that predictions depend on the rows that are evaluated "
            f"together: call network.eval(), {remedy}",
            UserWarning,
            stacklevel=stacklevel,
        )
    if initial:
        warnings.warn(
            f"the running statistics of the layers of batch normalisation {list(initial)} were never updated: predict "
            f"after network.eval(), {remedy}",
            UserWarning,
            stacklevel=stacklevel,
        )


def _look(model: Callable, values: dict[str, Tensor], params: Mapping, batch: Any, kwargs: Mapping) -> dict[str, Any]:
    """Layers of batch normalisation that a model runs, by name in the network that it calls."""
    layers: dict[str, Any] = {}
    sites = _Values(values)
    with ExitStack() as stack:

        def visit(name: str, module: _BatchNorm) -> None:
            if layers.setdefault(name, module) is not module:
                raise ValueError(
                    f"two networks of the model have a layer of batch normalisation called {name!r}: tell them apart "
                    "by names, as torch.nn.Sequential(OrderedDict(encoder=network)) gives"
                )
            # In evaluation mode, so that its statistics stay what they are for now.
            stack.callback(setattr, module, "training", module.training)
            module.training = False

        stack.enter_context(_before_each_layer(visit))
        try:
            _run(model, sites, params, batch, kwargs)
        finally:
            batch_norm.check_draw(values, sites.shapes)  # of which the model may have failed
    if not layers:
        raise ValueError(
            "no layer of batch normalisation (torch.nn.BatchNorm1d and its like) runs in the model: leave the call "
            "out, or, if torch.compile hides it, give a model of the network that is not compiled"
        )
    if without := [name for name, layer in layers.items() if layer.running_mean is None]:
        raise ValueError(
            f"the layers {without} have track_running_stats=False, and normalise each batch by itself, in predictions "
            "too: leave the call out, or make them with track_running_stats=True"
        )
    return layers


class _Averages:
    """Averages of the statistics of batches, by layer; `rows` are those of the batch that runs."""

    def __init__(self) -> None:
        self.rows = 0
        self.found: dict[Any, tuple] = {}  # mean, variance, rows, calls

    def add(self, layer: Any, inputs: Any, output: Any) -> None:
        """Take the statistics of the batch in; called by torch."""
        # Inside random_torch_module the layer has copies of its buffers, which are gone after the call.
        new = [b.to(torch.promote_types(b.dtype, torch.float32)) for b in (layer.running_mean, layer.running_var)]
        *old, rows, calls = self.found.get(layer, (torch.zeros_like(new[0]), torch.zeros_like(new[1]), 0, 0))
        rows += self.rows
        mean, variance = (a + (b - a) * (self.rows / rows) for a, b in zip(old, new, strict=True))
        self.found[layer] = mean, variance, rows, calls + 1

    def write(self, layers: Mapping[str, Any]) -> None:
        """Write the averages into the layers."""
        if made_anew := [name for name, layer in layers.items() if layer not in self.found]:
            raise ValueError(f"the layers {made_anew} are made anew each time: make the network outside the model")
        finite = {layer: torch.cat(values[:2]).isfinite().all() for layer, values in self.found.items()}
        batch_norm.check_finite([name for name, layer in layers.items() if not finite[layer]])
        for layer, (mean, variance, _, calls) in self.found.items():
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)
            layer.num_batches_tracked.fill_(calls)


@contextmanager
def _averages(layers: Mapping[str, Any]) -> Iterator[_Averages]:
    """Layers in training mode that hold the statistics of the batch alone; on an error, their buffers as before."""
    averages = _Averages()
    with ExitStack() as always, ExitStack() as on_error:
        for layer in layers.values():
            for buffer in layer.buffers():
                on_error.callback(buffer.copy_, buffer.clone())
            always.callback(vars(layer).update, training=layer.training, momentum=layer.momentum)
            layer.training, layer.momentum = True, 1.0
            layer.reset_running_stats()  # momentum 1 takes nothing of them, but for 0 times nan
            always.callback(layer.register_forward_hook(averages.add).remove)
        yield averages
        on_error.pop_all()
