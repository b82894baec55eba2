"""Cost of weight averaging beside steps of the host's SVI: prints the table of the README.

    python benchmarks/weight_averaging.py [--backend numpyro pyro] [--rounds 3]

AutoNormal and AutoDelta on the MLP of the benchmark, N(0, 1) priors, Adam, one fixed minibatch of 128. With a snapshot
after each step, what that adds to the time of a step is the cost of a snapshot; with one in an epoch of 469 steps it
is shared by these. NumPyro: ``svi.run`` with its bar and as one program. Pyro: a loop over ``svi.step``. Beside them
a loop over ``jax.jit(svi.update, donate_argnums=0)`` with a snapshot in 469 steps, which carries the averages through
each. Times are those of 1,200 steps after the first 400, so that compilation is left out. Contestants take turns for
some rounds and keep their fastest.
"""

import argparse
import contextlib
import io
import os
import time
from collections.abc import Callable

import numpy as np
from networks import SHAPES, B, N, data, forward_jax, forward_torch, weights

KINDS = ("SVI", "mixture", "low_rank")
EPOCH, FEW, MANY = 469, 400, 1600


def turns(contestants: dict[tuple, Callable[[int], float]], rounds: int) -> dict[tuple, float]:
    """Seconds a step of each contestant, a function of a number of steps: by the fastest short and long runs."""
    best = {(name, steps): np.inf for name in contestants for steps in (FEW, MANY)}
    for _ in range(rounds):
        for name, steps in best:
            best[name, steps] = min(best[name, steps], contestants[name](steps))
    return {name: (best[name, MANY] - best[name, FEW]) / (MANY - FEW) for name in contestants}


def numpyro_contestants() -> dict[tuple, Callable[[int], float]]:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    import optax
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoDelta, AutoNormal
    from numpyro.infer.initialization import init_to_value

    from bnn_ppl.numpyro import HWASVI

    os.environ.pop("CI", None)  # with it NumPyro switches its progress bar off
    forward = forward_jax("mlp")
    x, y = (jnp.asarray(values[:B]) for values in data("mlp"))

    def model(x, y):
        w = {k: numpyro.sample(k, dist.Normal(0, 1).expand(s).to_event(len(s))) for k, s in SHAPES["mlp"].items()}
        with numpyro.plate("data", N, subsample_size=B):
            numpyro.sample("y", dist.Categorical(logits=forward(w, x)), obs=y)

    def make(guide, kind, cycle=1):
        pair = model, guide(model, init_loc_fn=init_to_value(values=weights("mlp"))), optax.adam(1e-3), Trace_ELBO()
        return SVI(*pair) if kind == "SVI" else HWASVI(*pair, start=1, cycle_length=cycle, covariance=kind)

    def by_run(svi, bar):
        def seconds(steps):
            with contextlib.redirect_stderr(io.StringIO()):
                start = time.perf_counter()
                jax.block_until_ready(svi.run(jax.random.key(0), steps, x, y, progress_bar=bar).losses)
            return time.perf_counter() - start

        return seconds

    def by_update(svi):
        update = jax.jit(svi.update, donate_argnums=0)

        def seconds(steps):
            state = svi.init(jax.random.key(0), x, y)
            state, loss = update(state, x, y)
            start = time.perf_counter()
            for _ in range(steps):
                state, loss = update(state, x, y)
            jax.block_until_ready(loss)
            return time.perf_counter() - start

        return seconds

    found = {}
    for guide in (AutoNormal, AutoDelta):
        for kind in KINDS:
            found[guide.__name__, "run", kind] = by_run(make(guide, kind), True)
            found[guide.__name__, "run, one program", kind] = by_run(make(guide, kind), False)
            found[guide.__name__, "jitted update", kind] = by_update(make(guide, kind, EPOCH))
    return found


def pyro_contestants() -> dict[tuple, Callable[[int], float]]:
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoDelta, AutoNormal
    from pyro.infer.autoguide.initialization import init_to_value
    from pyro.optim import Adam

    from bnn_ppl.pyro import HWASVI

    pyro.enable_validation(False)
    forward = forward_torch("mlp")
    x, y = (torch.as_tensor(values[:B]) for values in data("mlp", channels_first=True))
    start = {k: torch.as_tensor(v) for k, v in weights("mlp", channels_first=True).items()}

    def model(x, y):
        w = {k: pyro.sample(k, dist.Normal(0.0, 1.0).expand(v.shape).to_event(v.ndim)) for k, v in start.items()}
        with pyro.plate("data", N, subsample_size=B):
            pyro.sample("y", dist.Categorical(logits=forward(w, x)), obs=y)

    def by_step(guide, kind):
        def seconds(steps):
            pyro.clear_param_store()
            pair = model, guide(model, init_loc_fn=init_to_value(values=start)), Adam({"lr": 1e-3}), Trace_ELBO()
            svi = SVI(*pair) if kind == "SVI" else HWASVI(*pair, start=1, cycle_length=1, covariance=kind)
            svi.step(x, y)
            begin = time.perf_counter()
            for _ in range(steps):
                svi.step(x, y)
            return time.perf_counter() - begin

        return seconds

    return {(guide.__name__, "step", kind): by_step(guide, kind) for guide in (AutoNormal, AutoDelta) for kind in KINDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["numpyro", "pyro"], nargs="*", default=["numpyro", "pyro"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print("| | guide | step of SVI | a snapshot, in steps: mixture | low rank | one in an epoch: mixture | low rank |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for backend in options.backend:
        best = turns({"numpyro": numpyro_contestants, "pyro": pyro_contestants}[backend](), options.rounds)
        for guide, how in dict.fromkeys(key[:2] for key in best):
            plain, *ours = (best[guide, how, kind] for kind in KINDS)
            ratios = [seconds / plain for seconds in ours]
            if how == "jitted update":
                cells = ["", "", *(f"{ratio:.3f}" for ratio in ratios)]
            else:
                cells = [f"{ratio - 1:.2f}" for ratio in ratios] + [f"{1 + (r - 1) / EPOCH:.4f}" for r in ratios]
            print(f"| {backend}, {how} | {guide} | {plain * 1e6:.0f} us | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
