"""Training of guides by SVI with either backend, for the examples on variational dropout and variance networks."""

from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np


class Backend(NamedTuple):
    """What models and guides are written with; both hosts have the same names."""

    name: str
    ppl: Any
    dist: Any
    guides: Any  # the host's autoguide module
    ours: Any  # bnn_ppl's


def backend(name: str) -> Backend:
    """The modules of "numpyro" or "pyro"."""
    host = import_module(f"{name}.distributions")
    return Backend(
        name, import_module(name), host, import_module(f"{name}.infer.autoguide"), import_module(f"bnn_ppl.{name}")
    )


def dense_network(
    b: Backend, widths: list[int], weight_prior: Callable, activation: Callable, normalize: bool = False
) -> Callable:
    """Classifier of rows with weights w0, w1, ..., whose prior is a function of name and shape, and N(0, 1) biases.

    With `normalize` each layer is followed by batch normalisation, by the mean and variance of the batch at hand, in
    training and evaluation, as in the reference code of the variance networks; biases come after it.
    """

    def model(x, y=None, *, subsample_size=None):
        weights = []
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            prior = weight_prior(f"w{i}", (inputs, outputs))
            w = b.ppl.sample(f"w{i}", prior.expand([inputs, outputs]).to_event(2))
            weights.append((w, b.ppl.sample(f"b{i}", b.dist.Normal(0.0, 1.0).expand([outputs]).to_event(1))))
        with b.ppl.plate("data", len(x), subsample_size=subsample_size) as rows:
            h, labels = (x, y) if subsample_size is None else (x[rows], y[rows])
            for i, (w, bias) in enumerate(weights):
                h = h @ w
                if normalize:
                    h = _standardize(h)
                h = h + bias
                h = activation(h) if i + 1 < len(weights) else h
            b.ppl.sample("y", b.dist.Categorical(logits=h), obs=labels)

    return model


def normalize_by_batch(b: Backend, network: Any) -> None:
    """Let batch normalisation follow each layer of a LeNet-5, by the batch at hand, without scale and shift."""
    for name, axes in (("conv1", 2), ("conv2", 2), ("hidden", 1), ("output", 1)):
        layer = getattr(network, name)
        if b.name == "numpyro":
            from flax import nnx

            normalized = nnx.Sequential(layer, _standardize)
        else:
            from torch import nn

            norm = (nn.BatchNorm1d, nn.BatchNorm2d)[axes - 1]
            normalized = nn.Sequential(layer, norm(len(layer.weight), affine=False, track_running_stats=False))
        setattr(network, name, normalized)


def _standardize(h):
    axes = tuple(range(h.ndim - 1))
    return (h - h.mean(axes)) / (h.var(axes) + 1e-5) ** 0.5


class Trained(NamedTuple):
    """A guide after its training, its parameters (NumPyro), losses of all steps, and the negative ELBO at the end."""

    guide: Any
    params: dict | None
    losses: np.ndarray
    final_loss: float

    def arguments(self) -> tuple:
        """What `median` and `log_alpha` of a guide take."""
        return () if self.params is None else (self.params,)


def train(
    b: Backend,
    model: Callable,
    guide: Any,
    data: tuple,
    *,
    steps: int,
    rates: Callable[[str], float],
    batch_size: int | None,
    warmup: int = 0,
    seed: int = 0,
) -> Trained:
    """Adam with rates that fall linearly to 0, by the name of the parameter, and KL annealing over `warmup` steps.

    The noise is in the outputs of the layers. The final loss is the mean over the last tenth of the steps.
    """
    pair = b.ours.local_reparameterization(model, guide)
    weights = np.minimum(1.0, (np.arange(steps) + 1) / (warmup + 1)).astype(np.float32)
    run = _train_numpyro if b.name == "numpyro" else _train_pyro
    params, losses = run(b, pair, guide, data, weights, rates, batch_size, seed)
    return Trained(guide, params, losses, float(losses[-max(steps // 10, 1) :].mean()))


def _train_numpyro(b, pair, guide, data, weights, rates, batch_size, seed):
    import jax
    import optax
    from numpyro.infer import SVI

    def adam(rate):
        return optax.adam(optax.linear_schedule(rate, 0.0, len(weights)))

    names = {}
    model, marked = pair

    def labels(params):
        names.update({name: f"{rates(name):g}" for name in params})
        return {name: names[name] for name in params}

    keywords = {} if batch_size is None else {"subsample_size": batch_size}
    guide_only = SVI(model, marked, optax.sgd(0.0), b.ours.AnnealedELBO(), **keywords)
    start = guide_only.init(jax.random.key(seed), *data)
    found = labels(guide_only.get_params(start))
    optimiser = optax.multi_transform({rate: adam(float(rate)) for rate in set(found.values())}, labels)
    svi = SVI(model, marked, optimiser, b.ours.AnnealedELBO(), **keywords)
    state = svi.init(jax.random.key(seed), *data)

    @jax.jit
    def several(state, weights, data):
        return jax.lax.scan(lambda state, weight: svi.update(state, *data, kl_weight=weight), state, weights)

    losses = []
    for part in np.array_split(weights, max(len(weights) // 200, 1)):
        state, some = several(state, part, data)
        losses.append(np.asarray(some))
    return svi.get_params(state), np.concatenate(losses)


def _train_pyro(b, pair, guide, data, weights, rates, batch_size, seed):
    import pyro
    import torch

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, marked = pair
    keywords = {} if batch_size is None else {"subsample_size": batch_size}
    guide(*data, **keywords)
    groups = [{"params": [parameter], "lr": rates(name)} for name, parameter in guide.named_parameters()]
    optimiser = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 1e-9, total_iters=len(weights))
    elbo = b.ours.AnnealedELBO()
    losses = []
    for weight in weights:
        optimiser.zero_grad()
        losses.append(elbo.loss_and_grads(model, marked, *data, kl_weight=float(weight), **keywords))
        optimiser.step()
        schedule.step()
    return None, np.array(losses)
