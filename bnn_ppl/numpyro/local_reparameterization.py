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
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from jax import Array, random
from jax.extend import core
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.primitives import Messenger, apply_stack

from bnn_ppl.guide_sites import Sites, check_sites, chooser
from bnn_ppl.local_noise import MARK, UNMARKED, check_found, check_uses
from bnn_ppl.numpyro.convolutions import fast_convolutions
from bnn_ppl.numpyro.programs import as_function, inner_program

_WRAPPERS = (dist.ExpandedDistribution, dist.Independent)
_SAME_ENTRIES = ("transpose", "reshape", "squeeze", "broadcast_in_dim", "convert_element_type", "slice", "rev", "neg")


def local_reparameterization(model: Callable, guide: Callable, *, sites: Sites = None) -> tuple[Callable, Callable]:
    """Give a model and its guide with noise in the outputs of layers instead of their weights.

    Parameters
    ----------
    model
        NumPyro model, written in any way: layers are found in its traced program, as matrix products and convolutions
        of a site of the guide with something else. In between, a weight may be reshaped, sliced and scaled by
        numbers.
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
    out of `sites`, and those on which the inputs of their own layer depend. Loops of the model's own (``lax.scan``) and
    functions with custom derivatives are not looked into. The model is run twice when it is traced, not when it runs;
    what it returns is of the draws of the weights.

    References
    ----------
    Kingma, Salimans & Welling (2015), Variational dropout and the local reparameterization trick.

    Examples
    --------
    >>> guide = AutoNormal(model)
    >>> svi = SVI(*local_reparameterization(model, guide), optax.adam(1e-3), TraceMeanField_ELBO())
    >>> params = svi.run(random.key(0), 10_000, x, y).params
    >>> predict(guide, x_test, model=model, params=params)
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
        with handlers.block(hide_fn=_is_output), _Tape() as tape:
            result = model(*args, **kwargs)
        outputs = [msg for msg in tape.messages if msg["is_output"]]
        weights = {m["name"]: _weights(m) for m in tape.messages if m["type"] == "sample" and MARK in m["infer"]}
        values = [_value(msg) for msg in outputs]
        if weights:
            again = functools.partial(_again, model, args, kwargs, tape.messages)
            values = _with_local_noise(again, weights, numpyro.prng_key())
        for msg, value in zip(outputs, values, strict=True):
            changed = {"fn": value} if msg["type"] == "sample" else {"value": value}
            apply_stack(msg | changed | {"stop": False})
        return result

    return local, marked


class _MarkNormals(Messenger):
    """Leave mean and scale with each site that is drawn from a normal, where `replay` hands them to the model."""

    def __init__(self, sites: Sites):
        super().__init__()
        self.chosen = chooser(sites)
        self.normals: dict[str, bool] = {}  # and whether they are chosen

    def __enter__(self) -> "_MarkNormals":
        super().__enter__()
        return self

    def process_message(self, msg: dict) -> None:
        """Mark the site; called by NumPyro."""
        if msg["type"] != "sample" or msg["is_observed"]:
            return
        base = msg["fn"]
        while isinstance(base, _WRAPPERS):
            base = base.base_dist
        # No vector from which the sites are cut, and no latent of rows, which would enter several outputs of its row.
        own = not msg["infer"].get("is_auxiliary") and not msg["cond_indep_stack"]
        if isinstance(base, dist.Normal) and own:
            self.normals[msg["name"]] = chosen = bool(self.chosen(msg["name"], msg["fn"].shape()))
            if chosen:
                msg["infer"] = msg["infer"] | {MARK: (base.loc, base.scale)}


class _Tape(Messenger):
    """Record the messages of a run; with those of an earlier one, give the run its values, one after another.

    What is an output is noted before handlers outside of the model, such as ``condition``, change the message.
    """

    def __init__(self, values: Iterable | None = None):
        super().__init__()
        self.messages: list[dict] = []
        self.values = None if values is None else iter(values)

    def __enter__(self) -> "_Tape":
        super().__enter__()
        return self

    def process_message(self, msg: dict) -> None:
        """Give the value; called by NumPyro."""
        msg["is_output"] = _is_output(msg)
        if self.values is not None and not msg["is_output"]:
            msg["value"] = next(self.values)

    def postprocess_message(self, msg: dict) -> None:
        """Record a copy, since plates change the message after this; called by NumPyro."""
        if msg["type"] == "sample" and msg["is_observed"] and not msg["is_output"]:
            raise ValueError(
                f"site {msg['name']!r} is observed by a handler around the model of local_reparameterization: put it "
                "around your model before, local_reparameterization(condition(model, ...), guide)"
            )
        self.messages.append(msg.copy())


def _is_output(msg: dict) -> bool:
    return msg["type"] == "deterministic" or (msg["type"] == "sample" and msg["is_observed"])


def _value(msg: dict) -> Any:
    return msg["fn"] if msg["type"] == "sample" else msg["value"]


class _Weights(NamedTuple):
    """A site, or some of its entries in another order or scale: its draw, and the mean and sd of its entries."""

    name: str
    draw: Array
    mean: Array
    sd: Array  # of any sign


def _weights(msg: dict) -> tuple[Array, Array, Array]:
    loc, scale = msg["infer"][MARK]
    draw = msg["value"]
    return draw, jnp.broadcast_to(loc, jnp.shape(draw)), jnp.broadcast_to(scale, jnp.shape(draw))


def _again(model: Callable, args: tuple, kwargs: dict, messages: list[dict], draws: dict[str, Array]) -> list:
    """What the model's outputs are under other draws of some sites."""
    kept = (draws.get(msg.get("name", ""), msg["value"]) for msg in messages if not msg["is_output"])
    with handlers.block(), _Tape(kept) as tape:
        model(*args, **kwargs)
    return [_value(msg) for msg in tape.messages if msg["is_output"]]


def _with_local_noise(again: Callable, weights: dict[str, tuple], key: Array) -> list:
    """The outputs, with noise in those of the layers."""
    structures: list[Any] = []

    def leaves(draws: dict[str, Array]) -> list:
        found, structure = jax.tree.flatten(again(draws))
        structures.append(structure)
        return found

    names = sorted(weights)
    closed = jax.make_jaxpr(leaves)({name: weights[name][0] for name in names})
    uses: Counter = Counter()

    def run(weights: dict[str, tuple], key: Array) -> list:
        uses.clear()

        def noise(name: str, like: Array) -> Array:
            own_key = random.fold_in(key, uses.total())
            uses[name] += 1
            return random.normal(own_key, like.shape, like.dtype)

        inputs = [_Weights(name, *weights[name]) for name in names]
        return [_draw_of(value) for value in _evaluate(closed.jaxpr, closed.consts, inputs, noise)]

    found = fast_convolutions(run)(weights, key)
    check_uses(names, uses, "matrix products and convolutions")
    return jax.tree.unflatten(structures[0], found)


def _draw_of(value: Any) -> Any:
    return value.draw if isinstance(value, _Weights) else value


def _evaluate(jaxpr: Any, consts: Any, args: list, noise: Callable) -> list:
    """Run a program on arrays and weights."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for eqn in jaxpr.eqns:
        inputs = [v.val if isinstance(v, core.Literal) else env[v] for v in eqn.invars]
        which = [i for i, value in enumerate(inputs) if isinstance(value, _Weights)]
        outputs = None
        if which and (sub := inner_program(eqn)):
            outputs = _evaluate(sub.jaxpr, sub.consts, inputs, noise)
        elif len(which) == 1:
            outputs = _exchanged(jaxpr, eqn, inputs, which[0], noise)
        if outputs is None:
            outputs = _run(jaxpr, eqn, [_draw_of(value) for value in inputs])
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [v.val if isinstance(v, core.Literal) else env[v] for v in jaxpr.outvars]


def _run(jaxpr: Any, eqn: Any, inputs: list) -> list:
    pairs = zip(inputs, eqn.invars, strict=True)
    return as_function(jaxpr, eqn)(*(value for value, v in pairs if not isinstance(v, core.Literal)))


def _exchanged(jaxpr: Any, eqn: Any, inputs: list, at: int, noise: Callable) -> list | None:
    """A layer with noise in its outputs, weights in another form, or None for what is done with the draw."""
    weights = inputs[at]
    kind = eqn.primitive.name

    def with_part(part: Array, others: Callable = lambda value: value) -> Array:
        return _run(jaxpr, eqn, [part if i == at else others(value) for i, value in enumerate(inputs)])[0]

    if kind == "dot_general" or (kind == "conv_general_dilated" and at == 1):
        mean = with_part(weights.mean)
        variance = with_part(jnp.square(weights.sd), jnp.square)
        sd = jnp.sqrt(jnp.maximum(variance, jnp.finfo(variance.dtype).tiny))  # the slope of the root at 0 is infinite
        return [mean + sd * noise(weights.name, mean)]
    same_size = weights.draw.size == eqn.outvars[0].aval.size or kind == "slice"
    number = len(inputs) == 2 and isinstance(eqn.invars[1 - at], core.Literal)  # arrays may depend on the weights
    scaled = number and (kind == "mul" or (kind == "div" and at == 0))
    if (kind in _SAME_ENTRIES and same_size) or scaled:
        draw, mean, sd = (with_part(part) for part in weights[1:])
        return [_Weights(weights.name, draw, mean, sd)]
    return None
