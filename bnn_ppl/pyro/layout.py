"""One look at a Pyro model: its plates, latent sites and held values, and what it cannot be sampled for."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.utils import _pytree as pytree

from bnn_ppl.layout import (
    STREAM_FAILURE,
    Plate,
    check_classes,
    check_observation,
    check_one_hot,
    resolve_batch_size,
    warn_data,
)
from bnn_ppl.pyro.plates import any_number_of_rows, full_data

Sites = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """What one look at a model tells: its plates, latent sites and the values that stay fixed.

    `transforms` lead from the user's to unconstrained coordinates, as Pyro's MCMC wants them; `constrain` leads
    back and leaves out the sites that are unconstrained anyway.
    """

    plates: dict[str, Plate]
    cut: dict[str, int]
    devices: dict[str, Any]
    transforms: dict[str, Any] = field(repr=False)
    constrain: dict[str, Any] = field(repr=False)
    initial: Sites = field(repr=False)
    held: dict[str, Any] = field(repr=False)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Unconstrained shape of each latent site, in the order of their names."""
        return {name: self.initial[name].shape for name in sorted(self.initial)}

    @property
    def subsampled(self) -> dict[str, Plate]:
        """The plates of which a minibatch takes a part, by name."""
        return {name: plate for name, plate in self.plates.items() if plate.subsampled}

    def first_rows(self) -> dict[str, Tensor]:
        """Rows 0 .. B - 1 of each subsampled plate: a stand-in where any minibatch will do."""
        return {n: torch.arange(p.batch_size, device=self.devices[n]) for n, p in self.subsampled.items()}


class _Start(Messenger):
    """Start values for the latent sites by an init strategy, and rows for the plates."""

    def __init__(self, init_strategy: Callable, rows: Mapping[str, int], held: Mapping[str, Any], streamed: bool):
        super().__init__()
        self.init_strategy = init_strategy
        self.rows = rows
        self.held = held
        self.streamed = streamed

    def _pyro_param(self, msg: dict) -> None:
        if msg["name"] in self.held:
            msg["value"], msg["done"] = self.held[msg["name"]], True

    def _pyro_sample(self, msg: dict) -> None:
        name, fn = msg["name"], msg["fn"]
        if isinstance(fn, _Subsample):
            if msg["value"] is not None and len(msg["value"]) < fn.size and not self.streamed:
                raise ValueError(
                    f"plate {name!r} brings its own subsample= of {len(msg['value'])} rows, so the kernel cannot "
                    "draw minibatches: write subsample_size= instead, and index the full data inside the plate; or "
                    "give the kernel minibatches= from which it takes batches"
                )
            if fn.subsample_size is not None and fn.subsample_size > fn.size:
                raise ValueError(f"plate {name!r} has subsample_size={fn.subsample_size}, more than its {fn.size} rows")
            if msg["value"] is None or name in self.rows:
                rows = self.rows.get(name, fn.subsample_size or fn.size)
                msg["value"] = torch.arange(rows, device=fn.device)
        elif not msg["is_observed"] and msg["value"] is None:
            if _is_discrete(fn):
                raise ValueError(
                    f"site {name!r} is discrete, and stochastic gradients need continuous sites: sum it out of "
                    "the model, or observe it"
                )
            try:
                biject_to(fn.support)
            except NotImplementedError as error:
                raise ValueError(
                    f"site {name!r} of {type(fn).__name__} has no bijection to unconstrained space ({error}): use "
                    "a distribution whose support torch.distributions.biject_to knows, or transform another one"
                ) from error
            value = self.init_strategy(msg)
            if value is not None:
                # A gradient through the start values shows which supports depend on other sites.
                msg["value"], msg["done"] = value.detach().requires_grad_(), True


def _is_discrete(fn: Any) -> bool:
    try:
        return fn.support.is_discrete
    except NotImplementedError:
        return False


def is_real(support: Any) -> bool:
    """Whether a support is all of the real numbers, elementwise."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def _has_bounds_that_move(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return any(isinstance(v, Tensor) and v.requires_grad for v in vars(support).values())


def _pass_through(name: str, cut: Mapping[str, int]) -> str:
    given = f" (batch_size={cut[name]})" if name in cut else ""
    return (
        f"{given}: pass the data through the plate, `with pyro.plate({name!r}, N) as idx: ... x[idx]`, or "
        "`pyro.subsample(x, event_dim=...)` inside it, for inputs and observations alike"
    )


def _frames(site: Mapping[str, Any]) -> list:
    return [frame for frame in site["cond_indep_stack"] if frame.dim is not None or frame.full_size]


def plates_of(sites: Mapping[str, dict]) -> dict[str, Plate]:
    """Plates of a trace by name."""
    plates = {}
    for name, site in sites.items():
        if site["type"] == "sample" and isinstance(site["fn"], _Subsample):
            inside = [
                s
                for s in sites.values()
                if s["type"] == "sample"
                and not isinstance(s["fn"], _Subsample)
                and not s["infer"].get("_deterministic")
                and name in {frame.name for frame in s["cond_indep_stack"]}
            ]
            plates[name] = Plate(
                name,
                size=site["fn"].size,
                batch_size=len(site["value"]),
                observes=any(s["is_observed"] for s in inside),
                holds_latents=any(not s["is_observed"] for s in inside),
            )
    return plates


def _latents(sites: Mapping[str, dict]) -> dict[str, dict]:
    return {
        n: s
        for n, s in sites.items()
        if s["type"] == "sample" and not s["is_observed"] and not isinstance(s["fn"], _Subsample)
    }


def _check_latents(sites: Mapping[str, dict], plates: Mapping[str, Plate], *, complete: bool = True) -> None:
    """Refuse latent sites that cannot be; a model that failed leaves an incomplete trace, from which it is told why."""
    latents = _latents(sites)
    for name, site in latents.items():
        around = [plates[frame.name] for frame in _frames(site)]
        data = [p for p in around if p.subsampled or ((p.observes or not complete) and "." in name)]
        if data:
            raise ValueError(
                f"latent site {name!r} lies inside the data plate {data[0].name!r} and would get one copy per row "
                "of it: sample it before the plate. A PyroModule network must be called outside the data plate, on "
                "a batch taken with the plate's indices. If the site is meant to be observed, its data were None: pass "
                "them to MCMC.run"
            )
        if _has_bounds_that_move(site["fn"].support):
            raise ValueError(
                f"the support of site {name!r} depends on another latent site, and Pyro's MCMC fixes the "
                "transforms at set-up: rescale a site of fixed support instead"
            )
    if complete and not latents:
        raise ValueError("the model has no latent sites to sample: every sample statement is observed")


def number_of_classes(fn: Any) -> int:
    """Of a categorical distribution; 0 for others, and for one with a mask, whose values may be anything."""
    while isinstance(fn, dist.ExpandedDistribution | dist.Independent):
        fn = fn.base_dist
    return fn.param_shape[-1] if isinstance(fn, dist.Categorical) else 0


def is_one_hot(fn: Any) -> bool:
    """Whether a distribution is over rows with a single 1, and has no mask."""
    while isinstance(fn, dist.ExpandedDistribution | dist.Independent):
        fn = fn.base_dist
    return isinstance(fn, torch.distributions.OneHotCategorical)


def check_values(name: str, values: Any, fn: Any) -> None:
    """Raise a ValueError for observations that are no class numbers, or no rows with a single 1."""
    if classes := number_of_classes(fn):
        check_classes(name, np.atleast_1d(to_numpy(values)), classes)
    elif is_one_hot(fn):
        check_one_hot(name, np.atleast_2d(to_numpy(values)))


def _check_rows(sites: Mapping[str, dict], plates: Mapping[str, Plate], cut: Mapping[str, int]) -> None:
    for name, site in sites.items():
        if site["type"] != "sample" or not site["is_observed"] or site["infer"].get("_deterministic"):
            continue
        if any(frame.dim is not None for frame in _frames(site)):
            check_observation(name, site["value"].shape, site["fn"].batch_shape, site["fn"].event_shape)
        if site["mask"] is None:  # what is masked may be anything
            check_values(name, site["value"], site["fn"])
        for frame in _frames(site):
            plate, shape = plates[frame.name], site["value"].shape
            if frame.dim is None or not plate.subsampled or not shape:
                continue
            axis = frame.dim - site["fn"].event_dim
            rows = shape[axis] if len(shape) >= -axis else 1
            if rows != plate.batch_size:
                raise ValueError(
                    f"observed site {name!r} has {rows} rows in plate {frame.name!r}, whose minibatch has "
                    f"{plate.batch_size}{_pass_through(frame.name, cut)}"
                )


def _look(
    model: Callable,
    init_strategy: Callable,
    held: Mapping[str, Any],
    rows: Mapping[str, int],
    args: tuple,
    kwargs: dict,
    streamed: bool = False,
) -> dict[str, dict]:
    start = _Start(init_strategy, rows, held, streamed)
    recorder = poutine.trace(model)
    with any_number_of_rows() if rows else nullcontext(), start, torch.enable_grad():
        try:
            return dict(recorder.get_trace(*args, **kwargs).nodes)
        except Exception as error:
            # A network called inside the data plate has weights of shapes with which the model may fail.
            sites = dict(recorder.msngr.trace.nodes)
            plates = plates_of(sites)
            _check_latents(sites, plates, complete=False)
            if streamed:
                raise ValueError(STREAM_FAILURE) from error
            failure = error
    subsampled = [name for name, plate in plates.items() if plate.subsampled]
    if subsampled and _works(full_data(model), init_strategy, held, args, kwargs):
        cut = {n: rows[n] for n in rows if n in subsampled}
        name = subsampled[0]
        raise ValueError(f"the model fails on a minibatch of plate {name!r}{_pass_through(name, cut)}") from failure
    raise failure


def _works(model: Callable, init_strategy: Callable, held: Mapping[str, Any], args: tuple, kwargs: dict) -> bool:
    try:
        _look(model, init_strategy, held, {}, args, kwargs)
    except Exception:
        return False
    return True


def inspect_model(
    model: Callable,
    init_strategy: Callable,
    args: tuple,
    kwargs: dict,
    batch_size: int | Mapping[str, int] | None,
    streamed: bool = False,
) -> Layout:
    """Look at a model: find its plates and sites, and refuse what minibatch sampling cannot do.

    Parameters
    ----------
    model, args, kwargs
        A Pyro model and its arguments.
    init_strategy
        Pyro init strategy, which gives the start values that the layout holds.
    batch_size
        As given to the kernel.
    streamed
        Whether the arguments are one batch of the kernel's ``minibatches=``.

    Returns
    -------
    Layout

    Raises
    ------
    ValueError
        For a model that cannot be sampled; the message names the site or plate and the remedy.
    """
    sites = _look(model, init_strategy, {}, {}, args, kwargs, streamed)
    held = {n: s["value"].detach() for n, s in sites.items() if s["type"] == "param"}
    plates = plates_of(sites)
    cut = resolve_batch_size(plates, batch_size)
    if cut:
        rows = {name: plate.batch_size for name, plate in plates.items()} | cut
        sites = _look(model, init_strategy, held, rows, args, kwargs)
    plates = plates_of(sites)
    _check_rows(sites, plates, cut)
    _check_latents(sites, plates)
    transforms = {name: biject_to(site["fn"].support).inv for name, site in _latents(sites).items()}
    return Layout(
        plates=plates,
        cut=cut,
        devices={name: sites[name]["fn"].device for name in plates},
        transforms=transforms,
        constrain={n: transforms[n].inv for n, s in _latents(sites).items() if not is_real(s["fn"].support)},
        initial={name: transforms[name](sites[name]["value"]).detach() for name in transforms},
        held=held,
    )


def same_held(a: Layout, b: Layout) -> bool:
    """Whether two looks at a model found the same values that stay fixed."""
    return a.held.keys() == b.held.keys() and all(torch.equal(a.held[name], b.held[name]) for name in a.held)


def warn_held(layout: Layout) -> None:
    """Tell the user of param sites that keep the value they have at set-up."""
    # "$$$" is in the names of pyro.module and random_torch_module, whose users know what they left without a prior.
    names = [name for name in layout.held if "$$$" not in name]
    if names:
        warnings.warn(
            f"param sites {names} are held at their initial values: MCMC samples latent sites only. "
            "Give them priors (pyro.sample, PyroSample) to infer them",
            UserWarning,
            stacklevel=3,
        )


def warn_not_finite(args: tuple, kwargs: dict) -> None:
    """Tell the user of data that are not finite, which only some minibatches meet."""
    for leaf in pytree.tree_leaves((args, kwargs)):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or bool(torch.isfinite(leaf.sum())):
            continue  # a sum is several times faster to look at than all values
        if not bool(torch.isfinite(leaf).all()):
            warn_data(tuple(leaf.shape))


def to_numpy(value: Any) -> np.ndarray:
    """A tensor as NumPy, not copied where it is on the CPU."""
    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    return (value.float() if value.dtype is torch.bfloat16 else value).numpy()
