"""Time of a training step with local reparameterisation, and variance of its gradients: prints the table of the README.

    python benchmarks/local_reparameterization.py [--backend numpyro pyro] [--rounds 5]

AutoNormal on the MLP and the LeNet-5 of the benchmark, N(0, 1) priors, TraceMeanField_ELBO, Adam, minibatches of 128 of
60,000 random rows, scales of 0.1 / sqrt(fan-in). Steps are compiled one by one in NumPyro, and eager in Pyro. The
contestants take turns for some rounds and keep their fastest. The variance is that of the gradient by all scales of
weights, summed over the entries, over draws of the noise for one minibatch; time x variance is what a given accuracy of
the gradient costs. bayesian-torch's layers (pip install bayesian-torch) are timed where they are installed.
"""

import argparse
import math
from collections.abc import Callable

import numpy as np
from networks import SHAPES, B, N, data, forward_jax, forward_torch, weights
from step_time import turns

STEPS = {"mlp": 200, "lenet5": 15}
DRAWS = {"mlp": 200, "lenet5": 60}


def fan_in_scale(shape: tuple[int, ...], channels_first: bool = False) -> float:
    """Standard deviation of the guide's normals."""
    axes = shape[1:] if channels_first and len(shape) == 4 else shape[:-1]
    return 0.1 / math.sqrt(max(math.prod(axes), 1))


def numpyro_contestants(name: str) -> tuple[dict[str, Callable[[], int]], dict[str, float]]:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    import optax
    from numpyro.infer import SVI, TraceMeanField_ELBO
    from numpyro.infer.autoguide import AutoNormal
    from numpyro.infer.initialization import init_to_value

    from bnn_ppl.numpyro import local_reparameterization

    forward = forward_jax(name)
    x, y = (jnp.asarray(values[:B]) for values in data(name))

    def model(x, y):
        w = {k: numpyro.sample(k, dist.Normal(0, 1).expand(s).to_event(len(s))) for k, s in SHAPES[name].items()}
        with numpyro.plate("data", N, subsample_size=B):
            numpyro.sample("y", dist.Categorical(logits=forward(w, x)), obs=y)

    guide = AutoNormal(model, init_loc_fn=init_to_value(values=weights(name)))
    pairs = {"weights sampled": (model, guide), "local": local_reparameterization(model, guide)}
    runs, variances = {}, {}
    for label, pair in pairs.items():
        svi = SVI(*pair, optax.adam(1e-3), TraceMeanField_ELBO())
        state = svi.init(jax.random.key(0), x, y)
        params = svi.get_params(state)
        params |= {f"{k}_auto_scale": jnp.full(s, fan_in_scale(s)) for k, s in SHAPES[name].items()}
        scales = [f"{k}_auto_scale" for k, s in SHAPES[name].items() if len(s) > 1]

        def gradient(key, pair=pair, params=params, scales=scales):
            found = jax.grad(lambda p: TraceMeanField_ELBO().loss(key, params | p, *pair, x, y))
            return found({k: params[k] for k in scales})

        several = [jax.jit(gradient)(key) for key in jax.random.split(jax.random.key(1), DRAWS[name])]
        variances[label] = sum(
            float(np.var([slope[k] for slope in map(dict, several)], axis=0, ddof=1).sum()) for k in scales
        )
        update = jax.jit(svi.update)

        def run(update=update, state=state):
            for _ in range(STEPS[name]):
                state, loss = update(state, x, y)
            jax.block_until_ready(loss)
            return STEPS[name]

        runs[label] = run
    return runs, variances


def pyro_contestants(name: str) -> tuple[dict[str, Callable[[], int]], dict[str, float]]:
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI, TraceMeanField_ELBO
    from pyro.infer.autoguide import AutoNormal
    from pyro.infer.autoguide.initialization import init_to_value
    from pyro.optim import Adam

    from bnn_ppl.pyro import local_reparameterization

    pyro.enable_validation(False)
    pyro.clear_param_store()
    forward = forward_torch(name)
    x, y = (torch.as_tensor(values[:B]) for values in data(name, channels_first=True))
    start = {k: torch.as_tensor(v) for k, v in weights(name, channels_first=True).items()}

    def model(x, y):
        w = {k: pyro.sample(k, dist.Normal(0.0, 1.0).expand(v.shape).to_event(v.ndim)) for k, v in start.items()}
        with pyro.plate("data", N, subsample_size=B):
            pyro.sample("y", dist.Categorical(logits=forward(w, x)), obs=y)

    guide = AutoNormal(model, init_loc_fn=init_to_value(values=start))
    guide(x, y)
    parameters = {}
    for k, v in start.items():
        setattr(guide.scales, k, torch.full_like(v, fan_in_scale(tuple(v.shape), channels_first=True)))
        parameters[k] = getattr(guide.scales, f"{k}_unconstrained")
    kept = {name: parameter.detach().clone() for name, parameter in guide.named_parameters()}
    pairs = {"weights sampled": (model, guide), "local": local_reparameterization(model, guide)}
    runs, variances = {}, {}
    for label, pair in pairs.items():
        wanted = [parameter for k, parameter in parameters.items() if start[k].ndim > 1]
        elbo = TraceMeanField_ELBO()
        by_scale = [-torch.expm1(-torch.nn.functional.softplus(u.detach())) for u in wanted]  # d scale / d parameter
        several = [torch.autograd.grad(elbo.differentiable_loss(*pair, x, y), wanted) for _ in range(DRAWS[name])]
        variances[label] = sum(
            float((torch.stack(slopes) / slope).var(0).sum())
            for slopes, slope in zip(zip(*several, strict=True), by_scale, strict=True)
        )
        svi = SVI(*pair, Adam({"lr": 1e-3}), TraceMeanField_ELBO())

        def run(svi=svi):
            with torch.no_grad():
                for name_, parameter in guide.named_parameters():
                    parameter.copy_(kept[name_])
            for _ in range(STEPS[name]):
                svi.step(x, y)
            return STEPS[name]

        runs[label] = run
    return runs | bayesian_torch(name, x, y), variances


def bayesian_torch(name: str, x, y) -> dict[str, Callable[[], int]]:
    """The same networks of bayesian-torch's layers, with weights sampled, and with Flipout."""
    import torch
    from torch.nn import functional

    try:
        from bayesian_torch import layers
    except ModuleNotFoundError:
        print("bayesian-torch is not installed")
        return {}
    runs = {}
    for kind in ("Reparameterization", "Flipout"):
        dense, conv = getattr(layers, f"Linear{kind}"), getattr(layers, f"Conv2d{kind}")
        if name == "mlp":
            parts = [dense(784, 100), dense(100, 10)]
        else:
            parts = [conv(1, 20, 5), conv(20, 50, 5), dense(800, 500), dense(500, 10)]
        optimiser = torch.optim.Adam([p for part in parts for p in part.parameters()], 1e-3)

        def run(parts=parts, optimiser=optimiser):
            for _ in range(STEPS[name]):
                h, divergence = x, 0.0
                for i, part in enumerate(parts):
                    h = h.flatten(1) if h.ndim == 4 and i >= len(parts) - 2 else h
                    h, kl = part(h)
                    divergence = divergence + kl
                    if h.ndim == 4:
                        h = functional.max_pool2d(h, 2)
                    elif i + 1 < len(parts):
                        h = functional.relu(h)
                loss = N / B * functional.cross_entropy(h, y, reduction="sum") + divergence
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            return STEPS[name]

        runs[f"bayesian-torch {kind}"] = run
    return runs


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--backend", nargs="+", choices=("numpyro", "pyro"), default=["numpyro", "pyro"])
parser.add_argument("--network", nargs="+", choices=tuple(STEPS), default=list(STEPS))
parser.add_argument("--rounds", type=int, default=5)
options = parser.parse_args()
make = {"numpyro": numpyro_contestants, "pyro": pyro_contestants}
for backend in options.backend:
    for network in options.network:
        runs, variances = make[backend](network)
        best = turns(runs, options.rounds)
        reference = best["weights sampled"]
        print(f"\n### {backend}, {network} ({reference * 1e3:.2f} ms a step with weights sampled)\n")
        print("| training step | time | variance | time x variance |\n| --- | --- | --- | --- |")
        for label, seconds in best.items():
            ratio = seconds / reference
            if label in variances:
                spread = variances[label] / variances["weights sampled"]
                print(f"| {label} | {ratio:.2f} | {spread:.3g} | {ratio * spread:.3g} |", flush=True)
            else:
                print(f"| {label} | {ratio:.2f} | - | - |", flush=True)
