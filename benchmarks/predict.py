"""Time and peak memory of `predict` beside forward passes written by hand: prints the table of the README.

    python benchmarks/predict.py [--backend numpyro|pyro] [--draws 1000] [--rows 10000] [--rounds 3]

The network is the MLP of the benchmark (79,510 weights, 0.32 MB a draw), on random rows. The contestants take turns for
some rounds and keep their fastest; ratios are to (a), one forward pass of all rows per draw. Memory is that of a
process of its own with the draws and the data in it, before `predict`, and at its peak while that runs (on Linux).
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from networks import INPUTS, SHAPES, forward_jax, forward_torch
from step_time import turns


def arrays(draws: int, rows: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Draws by site, inputs and labels."""
    rng = np.random.default_rng(0)
    w = {k: 0.05 * rng.standard_normal((draws, *s), dtype=np.float32) for k, s in SHAPES["mlp"].items()}
    return w, rng.standard_normal((rows, *INPUTS["mlp"]), dtype=np.float32), rng.integers(0, 10, rows)


def numpyro_contestants(draws: int, rows: int) -> dict[str, Callable[[], int]]:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    from bnn_ppl.numpyro import predict

    forward = forward_jax("mlp")
    w, x, y = jax.block_until_ready(jax.tree.map(jnp.asarray, arrays(draws, rows)))

    def model(x, y):
        w = {k: numpyro.sample(k, dist.Normal(0, 1).expand(s).to_event(len(s))) for k, s in SHAPES["mlp"].items()}
        with numpyro.plate("data", len(x)) as index:
            numpyro.sample("y", dist.Categorical(logits=forward(w, x[index])), obs=y[index])

    @jax.jit
    def results(w, x, y):
        log_p = jax.nn.log_softmax(forward(w, x))
        p = jnp.exp(log_p)
        return p, -(p * log_p).sum(-1), jnp.take_along_axis(log_p, y[:, None], 1)[:, 0]

    compiled = jax.jit(forward)

    def bare() -> int:
        for i in range(draws):
            found = compiled({k: v[i] for k, v in w.items()}, x)
        jax.block_until_ready(found)
        return draws

    def averaged() -> int:
        sums = [jnp.zeros((rows, 10)), jnp.zeros(rows), jnp.full(rows, -jnp.inf)]
        for i in range(draws):
            p, entropy, log_density = results({k: v[i] for k, v in w.items()}, x, y)
            sums = [sums[0] + p, sums[1] + entropy, jnp.logaddexp(sums[2], log_density)]
        jax.block_until_ready(sums)
        return draws

    def ours() -> int:
        predict(w, x, y, model=model)
        return draws

    return {"(a) forward passes alone": bare, "(b) with averages by hand": averaged, "(c) predict": ours}


def pyro_contestants(draws: int, rows: int) -> dict[str, Callable[[], int]]:
    import pyro
    import pyro.distributions as dist
    import torch

    from bnn_ppl.pyro import predict

    forward = forward_torch("mlp")
    given, x, y = arrays(draws, rows)
    w, x, y = {k: torch.tensor(v) for k, v in given.items()}, torch.tensor(x), torch.tensor(y)

    def model(x, y):
        w = {k: pyro.sample(k, dist.Normal(0.0, 1.0).expand(s).to_event(len(s))) for k, s in SHAPES["mlp"].items()}
        with pyro.plate("data", len(x)) as index:
            pyro.sample("y", dist.Categorical(logits=forward(w, x[index])), obs=y[index])

    @torch.no_grad()
    def bare() -> int:
        for i in range(draws):
            forward({k: v[i] for k, v in w.items()}, x)
        return draws

    @torch.no_grad()
    def averaged() -> int:
        sums = [torch.zeros(rows, 10), torch.zeros(rows), torch.full((rows,), -torch.inf)]
        for i in range(draws):
            log_p = forward({k: v[i] for k, v in w.items()}, x).log_softmax(-1)
            p = log_p.exp()
            sums[0] += p
            sums[1] -= (p * log_p).sum(-1)
            sums[2] = torch.logaddexp(sums[2], log_p.gather(1, y[:, None])[:, 0])
        return draws

    def ours() -> int:
        predict(w, x, y, model=model)
        return draws

    return {"(a) forward passes alone": bare, "(b) with averages by hand": averaged, "(c) predict": ours}


CONTESTANTS = {"numpyro": numpyro_contestants, "pyro": pyro_contestants}


def memory(field: str) -> int:
    """Of this process in MB: ``"VmRSS"`` now, ``"VmHWM"`` at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=list(CONTESTANTS), nargs="*", default=list(CONTESTANTS))
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-of", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        found = CONTESTANTS[options.memory_of](options.draws, options.rows)
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak anew, without that of making the draws
        found["(c) predict"]()
        print(before, memory("VmHWM"))
        return
    size = ["--draws", str(options.draws), "--rows", str(options.rows)]
    for backend in options.backend:
        command = [sys.executable, __file__, *size, "--memory-of", backend]
        before, after = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        best = turns(CONTESTANTS[backend](options.draws, options.rows), options.rounds)
        floor = best["(a) forward passes alone"]
        print(f"\n### {backend}, {options.draws} draws, {options.rows} rows ((a): {floor * 1e3:.2f} ms a draw)\n")
        print("| contestant | time / (a) |\n| --- | --- |")
        for name, seconds in best.items():
            print(f"| {name} | {seconds / floor:.2f} |")
        print(f"\nMemory: {before} MB with draws and data, at most {after} MB in predict.")


if __name__ == "__main__":
    main()
