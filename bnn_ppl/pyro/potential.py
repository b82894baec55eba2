"""From a Pyro model and its arguments to a minibatch potential over unconstrained sites.

With theta = t(z) for unconstrained z and a transform t at each latent site, U_c(theta) = -log p(y, theta) and J
the Jacobian of t, the potential at temperature T is::

    U_T(z) = U_c(t(z)) - T log |J(z)|

so that a sampler at temperature T draws theta from p(theta, y)^(1/T) in the user's own coordinates, and T = 0
finds their MAP. On a minibatch the plates scale the observed sites by N / B, which makes U_T unbiased. A likelihood
temperature L divides the log densities of the observed sites by L, and nothing else: p(theta) p(y | theta)^(1/L).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Distribution
from torch.utils import _pytree as pytree

from bnn_ppl.layout import beyond_message, bypass_message, sources, warn_unused_rows
from bnn_ppl.pyro.layout import Layout, Sites, check_values, to_numpy
from bnn_ppl.pyro.plates import any_number_of_rows


class _LogDensity(Messenger):
    """Put values into the sites of a model and add up its log density, without recording a trace."""

    def __init__(self, layout: Layout, values: Sites, batch: Mapping[str, Tensor]):
        super().__init__()
        self.layout = layout
        self.values = values
        self.batch = batch
        self.terms: dict[str, Tensor] = {}
        self.observed: dict[str, tuple[Tensor, list[str], Any]] = {}  # value, plates, and law if it has no mask
        self.latest = "the start of the model"

    def _pyro_param(self, msg: dict) -> None:
        msg["value"], msg["done"] = self.layout.held[msg["name"]], True

    def _pyro_sample(self, msg: dict) -> None:
        name, fn = msg["name"], msg["fn"]
        if isinstance(fn, _Subsample):
            if name in self.batch and msg["value"] is None:  # a plate may bring a batch of minibatches= itself
                msg["value"] = self.batch[name]
            return
        if not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[name], True
        elif msg["infer"].get("_deterministic"):
            return
        else:
            law = fn if msg["mask"] is None else None
            self.observed[name] = msg["value"], [frame.name for frame in msg["cond_indep_stack"]], law
        self.latest = f"site {name!r}"
        log_prob = fn.log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        self.terms[name] = scale_and_mask(log_prob, msg["scale"], msg["mask"])


@contextmanager
def _without_validation() -> Iterator[None]:
    """Let values that are not finite through, to be counted as divergences.

    The host's switch reaches the distributions made under it only, not those of a PyroSample.
    """
    original = Distribution._validate_sample
    Distribution._validate_sample = lambda self, value: None  # type: ignore[method-assign]
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        Distribution._validate_sample = original  # type: ignore[method-assign]


def _run(
    model: Callable, layout: Layout, z: Sites, batch: Mapping[str, Tensor], args: tuple, kwargs: dict
) -> tuple[_LogDensity, Sites]:
    values = {name: layout.constrain[name](z[name]) if name in layout.constrain else z[name] for name in z}
    density = _LogDensity(layout, values, batch)
    others = any(len(rows) != layout.plates[n].batch_size for n, rows in batch.items() if n in layout.plates)
    with any_number_of_rows() if layout.cut or others else nullcontext(), _without_validation(), density:
        try:
            model(*args, **kwargs)
        except RuntimeError as error:
            error.add_note(f"after {density.latest}")
            raise
        except IndexError as error:
            if not batch:
                raise
            raise ValueError(beyond_message(layout.plates, str(error))) from error
    return density, values


def potential_energy(
    model: Callable,
    layout: Layout,
    z: Sites,
    temperature: Tensor | float,
    batch: Mapping[str, Tensor],
    args: tuple,
    kwargs: dict,
    likelihood_temperature: float = 1.0,
) -> Tensor:
    """Minibatch potential U_T(z).

    Parameters
    ----------
    model, layout
        The model and what `inspect_model` found in it.
    z
        Unconstrained values by latent site.
    temperature
        T; it weighs the log-Jacobian only.
    batch
        Row indices, shape (B,), by subsampled plate.
    args, kwargs
        Arguments of the model.
    likelihood_temperature
        L, by which the log densities of observed sites are divided.

    Returns
    -------
    Tensor
        Scalar.
    """
    density, values = _run(model, layout, z, batch, args, kwargs)
    terms = [t.sum() / likelihood_temperature if n in density.observed else t.sum() for n, t in density.terms.items()]
    energy = -sum(terms[1:], terms[0])
    for name, transform in layout.constrain.items():
        energy = energy - temperature * transform.log_abs_det_jacobian(z[name], values[name]).sum()
    return energy


@torch.no_grad()
def check_fixed(model: Callable, layout: Layout, z: Sites, args: tuple, kwargs: dict) -> None:
    """Raise a ValueError for a model that draws numbers of its own."""
    first = layout.first_rows()
    one, same = (_run(model, layout, z, first, args, kwargs)[0] for _ in range(2))
    for name, term in one.terms.items():
        if not torch.allclose(term, same.terms[name], rtol=1e-4, equal_nan=True):
            raise ValueError(
                f"the log density of site {name!r} differs between two calls with the same values: the model draws "
                "random numbers of its own, as dropout does, and has no fixed potential. Switch that off "
                "(module.eval()), or make the noise a sample site"
            )


@torch.no_grad()
def check_rows(model: Callable, layout: Layout, z: Sites, args: tuple, kwargs: dict) -> None:
    """Raise a ValueError for a model whose data do not follow the plates' rows."""
    first = layout.first_rows()
    last = {name: rows + layout.plates[name].size - len(rows) for name, rows in first.items()}
    one, other = (_run(model, layout, z, rows, args, kwargs)[0] for rows in (first, last))
    arrays = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
    for name, (value, plates, law) in one.observed.items():
        for size in {layout.plates[n].size for n in plates if n in first}:
            for array in sources(to_numpy(other.observed[name][0]), size, arrays, to_numpy):
                warn_unused_rows(name, size, len(array))
                check_values(name, array[:size], law)
        disjoint = [n for n in plates if n in first and 2 * len(first[n]) <= layout.plates[n].size]
        if disjoint and _alike(one.terms[name], other.terms[name]):
            raise ValueError(bypass_message(name, disjoint[0], "the log densities"))
        if disjoint and value.is_floating_point() and _alike(value, other.observed[name][0]):
            raise ValueError(bypass_message(name, disjoint[0], "the values"))


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.numel() > 0 and torch.equal(a, b) and bool((a != a.flatten()[0]).any())


def explain_not_finite(
    model: Callable, layout: Layout, z: Sites, batch: Mapping[str, Tensor], args: tuple, kwargs: dict
) -> str:
    """Which sites make the potential non-finite at `z`, in words."""
    recorder = poutine.trace(model)
    with torch.no_grad():
        density, _ = _run(recorder, layout, z, batch, args, kwargs)
    causes = []
    for name, log_prob in density.terms.items():
        bad = (~torch.isfinite(log_prob)).nonzero()
        if len(bad):
            kind = "latent site" if name in z else "observed site"
            where = f", first at {tuple(bad[0].tolist())}" if bad.shape[1] else ""
            stack = recorder.msngr.trace.nodes[name]["cond_indep_stack"]
            frames = [f for f in stack if f.dim is not None and -f.dim <= bad.shape[1]]
            if frames:
                at = {f.name: int(bad[0][f.dim]) for f in frames}
                rows = {plate: int(batch[plate][i]) if plate in batch else i for plate, i in at.items()}
                where = ", first at " + " and ".join(f"row {i} of plate {plate!r}" for plate, i in rows.items())
            causes.append(f"{kind} {name!r} ({len(bad)} of {log_prob.numel()} values{where})")
    if not causes:
        causes = [f"the value of latent site {n!r}" for n, v in z.items() if not torch.isfinite(v).all()]
    return ", ".join(causes) or "the gradient alone"
