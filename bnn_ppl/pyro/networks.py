"""Bayesian networks from ordinary torch modules.

With f(x; w) the module evaluated at parameters w, a network is w ~ prior, one site a parameter, and x -> f(x; w)
through ``torch.func.functional_call``, which leaves the module as it is.
"""

from collections.abc import Callable, Mapping
from copy import copy
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from pyro.params import param_with_module_name
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import get_plates
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Distribution
from torch.func import functional_call
from torch.nn.parameter import is_lazy


def random_torch_module(name: str, torch_module: torch.nn.Module, prior: Any) -> Callable:
    """Network with random parameters, made from a torch module inside a Pyro model.

    The counterpart of NumPyro's ``random_flax_module``. Call it outside the data plates, and the network that it
    returns on the minibatch, inside the plate or outside::

        def model(x, y=None):
            net = random_torch_module("net", module, priors.fan_in_normal())
            with pyro.plate("data", len(x), subsample_size=128) as rows:
                pyro.sample("y", dist.Normal(net(x[rows]).squeeze(-1), 0.1), obs=None if y is None else y[rows])

    Parameters
    ----------
    name
        Name of the network. The site of parameter ``0.weight`` is ``{name}.0.weight``, as Pyro's own ``PyroModule``
        calls it (NumPyro's functions write ``{name}/`` instead).
    torch_module
        Any module whose parameters have their shapes and do not share memory. It is never changed: sampled values
        take the place of its parameters for the time of a call, and it sees copies of its buffers, so that running
        statistics stay what they are. A module in training mode works likewise, but batch normalisation then makes
        the likelihood of a row depend on its minibatch, and the kernels refuse dropout: call ``torch_module.eval()``.
        Keep it out of the attributes of a ``PyroModule``, which would make parameters to learn of it.
    prior
        Which distribution each parameter has; sites have the parameters' type and device, whatever those of the prior.

        * One distribution for all. It is broadcast to each parameter's shape, with all axes made event axes.
        * A dict by parameter name or pattern of :mod:`fnmatch`, such as ``{"*.weight": ..., "0.bias": ...}``. Exact
          names come before patterns, and earlier patterns before later ones. As with NumPyro's dicts of exact names,
          parameters that no key matches are not random. Values may be None or callables too.
        * A callable of (name, shape), ``("0.weight", (50, 784))``, that returns a distribution or None. Sites that it
          samples itself get ``{name}.`` before their names; call them ``0.weight_scale``, not ``0.weight.scale``, which
          Pyro's autoguides cannot keep beside ``0.weight``. See ``bnn_ppl.pyro.priors``.

        A parameter whose prior is None is not random. It is held if its ``requires_grad`` is False. Otherwise it is a
        ``pyro.param`` site ``{name}$$$0.weight``, the name that ``pyro.module`` gives, which starts at the module's
        value: SVI learns it (in the parameter store, not in the module), stochastic-gradient MCMC holds it.

    Returns
    -------
    callable
        The module's forward function at the sampled parameters, with the module's own arguments.

    Raises
    ------
    ValueError
        For a module without parameters, with shared or lazily shaped ones, or of Pyro's own kind; for a prior of
        another type, of a shape or support that does not fit a parameter, or with a key that no parameter takes; and
        inside a plate, where each row would get its own copy of the weights. The message names the parameter.
    """
    parameters = _parameters(name, torch_module)
    _check_plates(name)
    chosen = _by_parameter(name, prior, parameters)
    values = {}
    for key, parameter in parameters.items():
        with _Inside(name, key, parameter):
            own = _distribution(name, key, chosen[key], tuple(parameter.shape))
        if own is not None:
            values[key] = pyro.sample(f"{name}.{key}", _moved(own, parameter))
        elif parameter.requires_grad:
            start = parameter.detach().clone()
            values[key] = pyro.param(param_with_module_name(name, key), start, event_dim=start.dim())
    return partial(_evaluate, torch_module, values)


def _evaluate(torch_module: torch.nn.Module, values: dict[str, Tensor], /, *args: Any, **kwargs: Any) -> Any:
    buffers = {key: buffer.clone() for key, buffer in torch_module.named_buffers()}
    return functional_call(torch_module, values | buffers, args, kwargs)


class _Inside(Messenger):
    """Sites that a prior samples itself: the network's name before theirs, and its type and device."""

    def __init__(self, name: str, key: str, parameter: Tensor):
        super().__init__()
        self.name = name
        self.key = key
        self.parameter = parameter

    def _pyro_sample(self, msg: dict) -> None:
        if isinstance(msg["fn"], _Subsample):
            return
        msg["fn"] = _moved(msg["fn"], self.parameter)
        # Sites into which poutine.reparam takes one apart come here too, and have its whole name already.
        if not msg["name"].startswith(f"{self.name}.{self.key}"):
            msg["name"] = f"{self.name}.{msg['name']}"


def _moved(prior: Any, like: Tensor) -> Any:
    """A distribution whose tensors have the type and device of `like`."""
    other = copy(prior)
    for key, value in vars(prior).items():
        if isinstance(value, Tensor):
            vars(other)[key] = value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
        elif isinstance(value, Distribution):
            vars(other)[key] = _moved(value, like)
    return other


def _parameters(name: str, torch_module: Any) -> dict[str, torch.nn.Parameter]:
    """Parameters of a module by name, which are sound."""
    if not isinstance(torch_module, torch.nn.Module):
        raise ValueError(f"torch_module of network {name!r} must be a torch.nn.Module, got {torch_module!r}")
    for key, module in torch_module.named_modules():
        if isinstance(module, PyroModule):
            what = f"its part {key!r}" if key else "itself"
            raise ValueError(
                f"torch_module of network {name!r} is a PyroModule ({what}), whose parameters may be random already: "
                "call it as it is, or pass a module of plain torch.nn layers"
            )
    lazy = [key for key, value in (*torch_module.named_parameters(), *torch_module.named_buffers()) if is_lazy(value)]
    if lazy:
        raise ValueError(
            f"{lazy[0]!r} in torch_module of network {name!r} has no shape yet: run the module on one batch before "
            "the model"
        )
    parameters: dict[str, torch.nn.Parameter] = {}
    names: dict[int, str] = {}
    for key, value in torch_module.named_parameters(remove_duplicate=False):
        if id(value) in names:
            raise ValueError(
                f"{names[id(value)]!r} and {key!r} in torch_module of network {name!r} are one shared parameter, which "
                "cannot have two priors: keep it in one of the two, and pass it to the other in the module's forward"
            )
        names[id(value)] = key
        parameters[key] = value
    if not parameters:
        raise ValueError(
            f"torch_module of network {name!r} has no parameters to make random: call {type(torch_module).__name__} "
            "directly"
        )
    return parameters


def _check_plates(name: str) -> None:
    plates = [frame.name for frame in get_plates() if frame.vectorized]
    if plates:
        raise ValueError(
            f"network {name!r} is made inside plate {plates[0]!r}, where each of its weights would get one copy per "
            "row: call random_torch_module before the plate, and the network that it returns on the minibatch. The "
            "host's vectorize_particles=True and Predictive(parallel=True) are such plates too: leave them out"
        )


def _by_parameter(name: str, prior: Any, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `prior` says of each parameter."""
    if not isinstance(prior, Mapping):
        if prior is None:
            raise ValueError(
                f"prior of network {name!r} is None: give a distribution, a dict by parameter, or a callable of (name, "
                "shape); a network without random parameters is pyro.module's"
            )
        return dict.fromkeys(parameters, prior)
    keys = {}
    for key in parameters:
        matching = [pattern for pattern in prior if fnmatchcase(key, pattern)]
        keys[key] = key if key in prior else next(iter(matching), None)
    for pattern in prior:
        if pattern in keys.values():
            continue
        if any(fnmatchcase(key, pattern) for key in parameters):
            raise ValueError(
                f"prior of network {name!r} has a key {pattern!r} that takes no parameter, since earlier ones match "
                "all of its own: put it before them"
            )
        raise ValueError(
            f"prior of network {name!r} has a key {pattern!r} that matches no parameter: the parameters are "
            f"{list(parameters)}"
        )
    return {key: None if pattern is None else prior[pattern] for key, pattern in keys.items()}


def _distribution(name: str, key: str, prior: Any, shape: tuple[int, ...]) -> Any:
    """Prior of one parameter, of the parameter's shape; None for a parameter that is not random."""
    what = f"prior of parameter {key!r} of network {name!r}"
    if callable(prior) and not isinstance(prior, type | Distribution):
        prior = prior(key, shape)
    if prior is None:
        return None
    if not isinstance(prior, TorchDistributionMixin):
        remedy = "give a distribution of pyro.distributions, a callable of (name, shape) that returns one, or None"
        raise ValueError(f"{what} is {prior!r}: {remedy}")
    if prior.support.is_discrete:
        raise ValueError(f"{what} is the discrete {prior!r}: give a continuous distribution")
    inner = len(shape) - prior.event_dim
    try:
        own = prior.expand(shape[: max(inner, 0)]).to_event(max(inner, 0))
    except (RuntimeError, ValueError):
        own = None
    if own is None or own.shape() != shape:
        raise ValueError(
            f"{what} has batch shape {tuple(prior.batch_shape)} and event shape {tuple(prior.event_shape)}, which do "
            f"not broadcast to the parameter's shape {shape}: give a distribution of scalars, or one of that shape"
        )
    return own
