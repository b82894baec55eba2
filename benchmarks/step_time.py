"""Time of one gradient step, ours and others', side by side in one run: prints the table of the README.

    python benchmarks/step_time.py [--backend numpyro|pyro] [--network mlp|lenet5|regression] [--rounds 7]
                                   [--only NAME ...]

The contestants of a network take turns for a few rounds; each keeps its fastest round, and the table gives ratios
to the floor (a), the fastest compiled value and gradient of the same minibatch potential with the drawing and
gathering of the minibatch, or to (d), an eager torch loop written by hand. (e) are the other kernels, on the MLP;
--only takes the beginnings of the contestants' names, of which the first is then the reference.
"""

import argparse
import contextlib
import io
import os
import time
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
from networks import INPUTS, SHAPES, B, N, data, forward_jax, forward_torch, weights

STEPS = {  # enough for a run's own set-up not to show
    "numpyro": {"mlp": 8000, "lenet5": 200, "regression": 100_000},
    "pyro": {"mlp": 8000, "lenet5": 600, "regression": 40_000},
}


def turns(contestants: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Fastest time per step of each contestant, a function that runs some steps and returns their number."""
    best = dict.fromkeys(contestants, np.inf)
    for run in contestants.values():
        run()
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            steps = run()
            best[name] = min(best[name], (time.perf_counter() - start) / steps)
    return best


def report(title: str, reference: str, best: dict[str, float]) -> None:
    print(f"\n### {title} (reference: {reference}, {best[reference] * 1e6:.0f} us a step)\n")
    print("| contestant | time / reference |\n| --- | --- |")
    for name, seconds in best.items():
        print(f"| {name} | {seconds / best[reference]:.2f} |")


def numpyro_contestants(name: str) -> dict[str, Callable[[], int]]:
    import blackjax
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import MCMC

    from bnn_ppl.numpyro import PSGLD, SGHMC, SGLD, SGNHT, minibatches
    from bnn_ppl.numpyro.convolutions import fast_convolutions
    from bnn_ppl.schedules import Cyclical

    forward = forward_jax(name)
    start = {k: jnp.asarray(v) for k, v in weights(name).items()}
    x, y = (jnp.asarray(a) for a in data(name))
    steps = STEPS["numpyro"][name]

    def log_likelihood(w, x, y):
        output = forward(w, x)
        if name == "regression":
            return -0.5 * jnp.sum((y - output) ** 2)
        return jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(output), y[:, None], 1))

    def log_prior(w):
        return -0.5 * sum(jnp.vdot(v, v) for v in w.values())

    def model(x, y):
        w = {k: numpyro.sample(k, dist.Normal(0, 1).expand(s).to_event(len(s))) for k, s in SHAPES[name].items()}
        with numpyro.plate("data", N, subsample_size=B) as rows:
            output = forward(w, x[rows])
            noise = dist.Normal(output, 1) if name == "regression" else dist.Categorical(logits=output)
            numpyro.sample("y", noise, obs=y[rows])

    words = jnp.array([1, 2], "uint32")

    def batch(step, x, y):
        epoch, position = step // (N // B), (step % (N // B)) * B
        rows = minibatches.indices(words, epoch, position, step, size=N, batch_size=B, subsampling="epoch")
        return x[rows], y[rows]

    def potential(w, step, x, y):
        return -N / B * log_likelihood(w, *batch(step, x, y)) - log_prior(w)

    gradient = jax.jit(jax.value_and_grad(potential))

    def floor_calls() -> int:
        for i in range(steps):
            _, slope = gradient(start, jnp.int32(i), x, y)
        jax.block_until_ready(slope)
        return steps

    @jax.jit
    def descend(w, x, y):
        def body(w, i):
            _, slope = jax.value_and_grad(fast_convolutions(lambda w: potential(w, i, x, y)))(w)
            return jax.tree.map(lambda p, g: p - 1e-9 * g, w, slope), None

        return jax.lax.scan(body, w, jnp.arange(steps), unroll=4)[0]

    def floor_loop() -> int:
        jax.block_until_ready(descend(start, x, y))
        return steps

    sghmc = partial(SGHMC, friction=100.0)

    def ours(make=sghmc, num_chains: int = 1, **arguments) -> Callable[[], int]:
        draws = max(steps // 100, 1)
        kernel = make(model, **{"step_size": 1e-5, "steps_per_draw": 100} | arguments)
        method = "vectorized" if num_chains > 1 else "sequential"
        mcmc = MCMC(kernel, num_warmup=1, num_samples=draws, num_chains=num_chains, chain_method=method)

        def run() -> int:
            with contextlib.redirect_stderr(io.StringIO()):
                if mcmc.last_state is not None:
                    mcmc.post_warmup_state = mcmc.last_state
                key = jax.random.key(0) if mcmc.last_state is None else mcmc.last_state.rng_key
                mcmc.run(key, x, y, extra_fields=tuple(f"~z.{site}" for site in SHAPES[name]))
                jax.block_until_ready(mcmc.last_state.z)
            return draws * 100 * num_chains

        return run

    def blackjax_sghmc(inner: int) -> Callable[[], int]:
        def log_density_gradient(w, rows):
            return jax.grad(fast_convolutions(lambda w: log_prior(w) + N / B * log_likelihood(w, *rows)))(w)

        algorithm = blackjax.sghmc(log_density_gradient, inner)

        @jax.jit
        def loop(w, x, y):
            def body(w, i):
                key = jax.random.fold_in(jax.random.key(0), i)
                return algorithm.step(key, w, batch(i, x, y), 1e-8), None

            return jax.lax.scan(body, w, jnp.arange(steps // inner))[0]

        def run() -> int:
            jax.block_until_ready(loop(start, x, y))
            return steps // inner * inner

        return run

    found = {
        "(a) gradient alone, compiled call": floor_calls,
        "(a) gradient alone, compiled loop": floor_loop,
        '(b) SGHMC, noise="normal"': ours(),
        '(b) SGHMC, noise="fast"': ours(noise="fast"),
        '(b) SGHMC, "symplectic_euler", refresh every 10': ours(integrator="symplectic_euler", resample_every=10),
        "(c) blackjax sghmc, 10 steps a call": blackjax_sghmc(10),
        "(c) blackjax sghmc, 2 steps a call": blackjax_sghmc(2),
    }
    if name == "mlp":
        found |= {f"(b) SGHMC, {c} vectorized chains, per chain-step": ours(num_chains=c) for c in (4, 16)}
        cycles = {"step_size": Cyclical(1e-5, 1000, exploration=0.5, draws_per_cycle=10), "steps_per_draw": 1}
        found |= {
            "(e) SGLD": ours(SGLD),
            '(e) SGLD, "lm"': ours(SGLD, integrator="lm"),
            "(e) SGLD, Cyclical": ours(SGLD, **cycles),
            "(e) SGHMC": ours(),
            "(e) SGNHT": ours(partial(SGNHT, friction=100.0)),
            "(e) PSGLD": ours(PSGLD),
            '(e) SGHMC, mass="adapt"': ours(mass="adapt"),
        }
    return found


def pyro_contestants(name: str) -> dict[str, Callable[[], int]]:
    import posteriors
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import MCMC

    from bnn_ppl.pyro import PSGLD, SGHMC, SGLD, SGNHT

    forward = forward_torch(name)
    start = {k: torch.tensor(v) for k, v in weights(name, channels_first=True).items()}
    shapes = {k: v.shape for k, v in start.items()}
    x, y = (torch.tensor(a) for a in data(name, channels_first=True))
    steps = STEPS["pyro"][name]

    def log_posterior(w, rows):
        x, y = rows
        output = forward(w, x)
        if name == "regression":
            fit = -0.5 * ((y - output) ** 2).sum()
        else:
            fit = -torch.nn.functional.cross_entropy(output, y, reduction="sum")
        return N / B * fit - 0.5 * sum((v * v).sum() for v in w.values())

    def model(x, y):
        w = {k: pyro.sample(k, dist.Normal(0.0, 1.0).expand(s).to_event(len(s))) for k, s in shapes.items()}
        with pyro.plate("data", N, subsample_size=B) as rows:
            output = forward(w, x[rows])
            noise = dist.Normal(output, 1.0) if name == "regression" else dist.Categorical(logits=output)
            pyro.sample("y", noise, obs=y[rows])

    def eager() -> int:
        w = {k: v.clone().requires_grad_() for k, v in start.items()}
        momenta = {k: torch.zeros_like(v) for k, v in w.items()}
        h, friction = 1e-5, 100.0
        order = torch.randperm(N)
        for i in range(steps):
            rows = order[(i * B) % (N - B) :][:B]
            slopes = torch.autograd.grad(log_posterior(w, (x[rows], y[rows])), list(w.values()))
            with torch.no_grad():
                for (k, v), slope in zip(w.items(), slopes, strict=True):
                    momenta[k].mul_(1 - h * friction).add_(slope, alpha=h)
                    momenta[k].add_(torch.randn_like(v), alpha=(2 * h * friction) ** 0.5)
                    v.add_(momenta[k], alpha=h)
        return steps

    sghmc = partial(SGHMC, friction=100.0)

    def ours(make=sghmc, **arguments) -> Callable[[], int]:
        kernel = make(model, step_size=1e-5, steps_per_draw=steps // 2, **arguments)

        def run() -> int:
            mcmc = MCMC(kernel, num_samples=1, warmup_steps=1, disable_progbar=True, initial_params=dict(start))
            mcmc.run(x, y)
            return steps // 2 * 2

        return run

    transform = posteriors.sgmcmc.baoa.build(lambda w, rows: (log_posterior(w, rows), torch.zeros(())), lr=1e-5)

    def posteriors_baoa() -> int:
        state = transform.init({k: v.clone() for k, v in start.items()})
        order = torch.randperm(N)
        for i in range(steps):
            rows = order[(i * B) % (N - B) :][:B]
            state, _ = transform.update(state, (x[rows], y[rows]), inplace=True)
        return steps

    found = {
        "(d) eager torch loop by hand": eager,
        "(b) SGHMC": ours(),
        "(b) SGHMC, jit_compile=True": ours(jit_compile=True),
        "(c) posteriors baoa": posteriors_baoa,
    }
    if name == "mlp":
        found |= {
            "(e) SGLD": ours(SGLD),
            '(e) SGLD, "lm"': ours(SGLD, integrator="lm"),
            "(e) SGHMC": ours(),
            "(e) SGNHT": ours(partial(SGNHT, friction=100.0)),
            "(e) PSGLD": ours(PSGLD),
            '(e) SGHMC, mass="adapt"': ours(mass="adapt"),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["numpyro", "pyro"], nargs="*", default=["numpyro", "pyro"])
    parser.add_argument("--network", choices=list(INPUTS), nargs="*", default=list(INPUTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=[""])
    options = parser.parse_args()
    os.environ.pop("CI", None)  # with it NumPyro switches its progress bar off, and then compiles at every run
    warnings.simplefilter("ignore")
    for backend in options.backend:
        for name in options.network:
            found = {"numpyro": numpyro_contestants, "pyro": pyro_contestants}[backend](name)
            found = {key: run for key, run in found.items() if key.startswith(tuple(options.only))}
            best = turns(found, options.rounds)
            floors = [key for key in found if key.startswith("(a)")] or list(found)[:1]
            reference = min(floors, key=best.__getitem__)
            report(f"{backend}, {name}", reference, best)


if __name__ == "__main__":
    main()
