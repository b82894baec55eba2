"""Peak memory of a run against its gradient steps and its draws: prints the memory table of the README.

    python benchmarks/memory.py

Each run is a process of its own, on the MLP of the benchmark (79,510 weights, 0.3 MB a draw; 188 MB of data).
"""

import resource
import subprocess
import sys

RUNS = [(10, 10), (100, 10), (10, 100)]


def numpyro_run(steps_per_draw: int, draws: int) -> None:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from networks import SHAPES, B, N, data, forward_jax
    from numpyro.infer import MCMC

    from bnn_ppl.numpyro import SGHMC

    def model(x, y):
        w = {k: numpyro.sample(k, dist.Normal(0, 1).expand(s).to_event(len(s))) for k, s in SHAPES["mlp"].items()}
        with numpyro.plate("data", N, subsample_size=B) as rows:
            logits = forward_jax("mlp")(w, x[rows])
            numpyro.sample("y", dist.Categorical(logits=logits), obs=y[rows])

    kernel = SGHMC(model, step_size=1e-5, friction=100.0, steps_per_draw=steps_per_draw)
    mcmc = MCMC(kernel, num_warmup=0, num_samples=draws, progress_bar=False, jit_model_args=True)
    mcmc.run(jax.random.key(0), *(jnp.asarray(a) for a in data("mlp")))


def pyro_run(steps_per_draw: int, draws: int) -> None:
    import pyro
    import pyro.distributions as dist
    import torch
    from networks import SHAPES, B, N, data, forward_torch
    from pyro.infer import MCMC

    from bnn_ppl.pyro import SGHMC

    def model(x, y):
        w = {k: pyro.sample(k, dist.Normal(0.0, 1.0).expand(s).to_event(len(s))) for k, s in SHAPES["mlp"].items()}
        with pyro.plate("data", N, subsample_size=B) as rows:
            logits = forward_torch("mlp")(w, x[rows])
            pyro.sample("y", dist.Categorical(logits=logits), obs=y[rows])

    kernel = SGHMC(model, step_size=1e-5, friction=100.0, steps_per_draw=steps_per_draw)
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=0, disable_progbar=True)
    mcmc.run(*(torch.tensor(a) for a in data("mlp")))


def main() -> None:
    print("| backend | steps a draw | draws | peak memory, MB |\n| --- | --- | --- | --- |")
    for backend in ("numpyro", "pyro"):
        for steps, draws in RUNS:
            command = [sys.executable, __file__, backend, str(steps), str(draws)]
            peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            print(f"| {backend} | {steps} | {draws} | {peak.strip()} |")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        {"numpyro": numpyro_run, "pyro": pyro_run}[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
