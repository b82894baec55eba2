"""How near kernels and other approximations come to the posterior: functions beside those of a long NUTS run.

    python benchmarks/posterior_fidelity.py --data FOLDER --task boston
    python benchmarks/posterior_fidelity.py --data FOLDER --task logistic
    python benchmarks/posterior_fidelity.py --task digits

boston is a network of 50 units with learned noise on the first split of bostonHousing (455 rows), logistic tells 4
from 9 on 50 principal components of MNIST (11,791 rows), digits is a network of 10 units on scikit-learn's digits
(1,437 rows). Functions are the regression's mean, or logits less their mean over the classes. On each test row a
function has a mean and a standard deviation over the draws: the table has the distance of the means in standard
deviations of NUTS, the ratio of the standard deviations and its distance from 1, as medians over rows and classes; for
classes the total variation between the mean probabilities; and for kernels their temperatures, kinetic and
configurational. Gradients are counted in passes over the data, those of the warm-up, of control variates and of the
optimiser that finds their centre included; leapfrog steps for NUTS.
The functions of NUTS are kept in out/, and read there next time. Everything but NUTS starts near the prior's centre.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from jax import lax, random
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoNormal
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from bnn_ppl import to_arviz
from bnn_ppl.diagnostics import function_diagnostics
from bnn_ppl.models.numpyro import logistic_regression, mlp_classification, mlp_regression
from bnn_ppl.numpyro import PSGLD, SGHMC, SGLD, SGNHT
from bnn_ppl.schedules import Cyclical

numpyro.set_host_device_count(2)
DRAWS, BATCH, MEMBERS = 1000, 128, 10

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, help="folder with uci/ and mnist/")
parser.add_argument("--task", choices=("boston", "logistic", "digits"), default="boston")
parser.add_argument("--nuts-warmup", type=int, default=500)
parser.add_argument("--nuts-draws", type=int, default=500)
parser.add_argument("--passes", type=float, help="over the data by each chain, after the warm-up of a fifth of them")
parser.add_argument("--chains", type=int, default=4)
parser.add_argument("--only", nargs="*", help="rows of the table, by the beginnings of their names")


class Task(NamedTuple):
    """A model with its data, and settings that suit it."""

    model: Any
    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    passes: float  # of a chain after its warm-up
    step_size: float  # of SGHMC on minibatches; three times as much on all rows
    friction: float
    langevin: float  # step size of SGLD
    preconditioned: tuple[float, float]  # step size and damping of PSGLD
    learning_rate: float  # of Adam on U / N, for the others


def boston(folder: Path) -> Task:
    """Standardised training inputs and targets, and test inputs."""
    folder = folder / "uci" / "bostonHousing"
    table = np.loadtxt(folder / "data.txt")
    columns, target = (np.loadtxt(folder / f"index_{what}.txt").astype(int) for what in ("features", "target"))
    train, test = (np.loadtxt(folder / f"index_{part}_0.txt").astype(int) for part in ("train", "test"))
    x, y = table[:, columns], table[:, target]
    scale = np.where(x[train].std(0) > 0, x[train].std(0), 1)
    inputs = ((x - x[train].mean(0)) / scale).astype("float32")
    outputs = ((y[train] - y[train].mean()) / y[train].std()).astype("float32")
    model = mlp_regression((50,), activation="tanh")
    return Task(model, inputs[train], outputs, inputs[test], 20_000, 1e-3, 10.0, 1e-5, (3e-3, 100.0), 1e-2)


def logistic(folder: Path) -> Task:
    """The digits 4 and 9 of MNIST; the test rows are 500 of its test images."""
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from data import load_images

    images = load_images(folder, "mnist")
    (x, y), (x_test, _) = (
        (x[np.isin(y, (4, 9))].reshape(-1, 784), (y[np.isin(y, (4, 9))] == 9).astype(int))
        for x, y in ((images.x_train, images.y_train), (images.x_test, images.y_test))
    )
    centre = x.mean(0)
    axes = np.linalg.svd(x - centre, full_matrices=False)[2][:50].T
    scores, test = (x - centre) @ axes, (x_test[:500] - centre) @ axes
    scale = scores.std(0)
    model = logistic_regression(prior_scale=1.0)
    inputs = (scores / scale).astype("float32"), y, (test / scale).astype("float32")
    return Task(model, *inputs, 500, 1e-3, 30.0, 1e-5, (1e-2, 100.0), 1e-2)


def digits(folder: Path | None) -> Task:
    """Pixels from 0 to 1."""
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, _ = train_test_split(x / 16, y, test_size=0.2, random_state=0)
    inputs = x_train.astype("float32"), y_train, x_test.astype("float32")
    model = mlp_classification((10,), activation="tanh", prior_scale=3.0)
    return Task(model, *inputs, 20_000, 3e-3, 10.0, 3e-5, (1e-2, 100.0), 1e-2)


class Found(NamedTuple):
    """Draws by site, shapes (chains, draws, ...), what they cost, and the temperatures."""

    draws: dict[str, Any]
    passes: float
    seconds: float
    temperatures: str = "-"


def functions_of(draws: dict[str, Any]) -> np.ndarray:
    """Functions on the test rows, shape (chains, draws, rows) or (chains, draws, rows, classes)."""

    def chain(draws: dict[str, Any]) -> Any:
        return lax.map(lambda w: task.model.forward(w, task.x_test), draws)

    values = np.asarray(jax.jit(lambda draws: lax.map(chain, draws))(draws))
    return values - values.mean(-1, keepdims=True) if values.ndim == 4 else values


def probabilities(functions: np.ndarray) -> np.ndarray:
    """Mean class probabilities, shape (rows, classes)."""
    if functions.ndim == 4:
        return np.asarray(jax.nn.softmax(functions, -1)).mean((0, 1))
    one = np.asarray(jax.nn.sigmoid(functions)).mean((0, 1))
    return np.stack([1 - one, one], -1)


def sample(kernel: Any, method: str, warmup: int, draws: int, seed: int) -> tuple[MCMC, float]:
    """A finished MCMC, and its seconds."""
    start = time.perf_counter()
    mcmc = MCMC(
        kernel,
        num_warmup=warmup,
        num_samples=draws,
        num_chains=options.chains,
        chain_method=method,
        progress_bar=False,
    )
    mcmc.run(random.key(seed), task.x, task.y, extra_fields=("num_steps",) if isinstance(kernel, NUTS) else ())
    jax.block_until_ready(mcmc.get_samples())
    return mcmc, time.perf_counter() - start


def nuts() -> dict[str, np.ndarray]:
    """The reference, from its file where there is one."""
    path = Path("out") / f"nuts_{options.task}_{options.nuts_draws}.npz"
    if not path.exists():
        mcmc, seconds = sample(NUTS(task.model), "parallel", options.nuts_warmup, options.nuts_draws, 0)
        passes = np.asarray(mcmc.get_extra_fields()["num_steps"]).mean() * options.nuts_draws
        passes *= 1 + options.nuts_warmup / options.nuts_draws  # the host does not count those of the warm-up
        path.parent.mkdir(exist_ok=True)
        functions = functions_of(mcmc.get_samples(group_by_chain=True))
        np.savez(path, functions=functions, seconds=seconds, passes=passes)
    return dict(np.load(path))


def kernel_run(make: Callable, rows: int = BATCH, before: float = 0.0) -> Found:
    """A chain of 1,000 draws after 200; `before` are passes that were needed to make the kernel."""
    steps = max(int(task.passes * len(task.x) / rows / DRAWS), 3)
    kernel = make(task.model, batch_size=rows, steps_per_draw=steps)
    mcmc, seconds = sample(kernel, "vectorized", DRAWS // 5, DRAWS, 1)
    extra = mcmc.get_extra_fields()
    values = [extra.get(f"{kind}_temperature") for kind in ("kinetic", "configurational")]
    temperatures = ", ".join("-" if v is None else f"{float(np.mean(v)):.3f}" for v in values)
    control = kernel.settings.control_variate
    touched = steps * rows / len(task.x) * (2 if control else 1) + (control == "svrg")
    return Found(mcmc.get_samples(group_by_chain=True), before + touched * 1.2 * DRAWS, seconds, temperatures)


def compensated_run() -> Found:
    """With the variance of the gradient noise that a tenth as long a run measures at its end."""
    make = partial(SGHMC, task.model, step_size=task.step_size, friction=task.friction, batch_size=BATCH)
    steps = max(int(task.passes * len(task.x) / BATCH / DRAWS), 3)
    pilot, _ = sample(make(steps_per_draw=steps), "vectorized", DRAWS // 10, 8, 2)
    noise = to_arviz(pilot, noise_batches=64)["sample_stats"]["gradient_noise"].mean("chain")
    variance = {str(site): float(noise.sel(site=site)) for site in noise["site"].values}
    before = steps * BATCH / len(task.x) * (DRAWS // 10 + 8)
    kernel = partial(SGHMC, step_size=task.step_size, friction=task.friction, gradient_noise_variance=variance)
    return kernel_run(kernel, before=before)


def centred_run(step_size: float) -> Found:
    """With a control variate at a MAP estimate."""
    guide = AutoDelta(task.model)
    params, before = train(guide, 1, BATCH, min(task.passes, 200))
    centre = guide.median(params)
    kernel = partial(SGHMC, step_size=step_size, friction=task.friction, control_variate=centre)
    return kernel_run(kernel, before=before)


def cyclical_run(make: Callable, peak: float) -> Found:
    """Chains of 20 cycles of 50 draws each, whose first 4 are left out; half of a cycle explores, at T = 0."""
    cycles, draws = 24, 50
    length = int(1.2 * task.passes * len(task.x) / BATCH / cycles)
    schedule = Cyclical(peak=peak, cycle_length=length, exploration=0.5, draws_per_cycle=draws)
    mcmc, seconds = sample(make(task.model, step_size=schedule, batch_size=BATCH), "vectorized", 4 * draws, DRAWS, 1)
    return Found(mcmc.get_samples(group_by_chain=True), length * cycles * BATCH / len(task.x), seconds)


def blackjax_run(inner: int = 10) -> Found:
    """SGHMC of blackjax on the same potential, with a refresh and a new minibatch every 10 steps."""
    start = time.perf_counter()
    ours = SGHMC(task.model, step_size=task.step_size, friction=task.friction, batch_size=BATCH)
    keys = random.split(random.key(1), options.chains)
    states = ours.init(keys, 1, None, (task.x, task.y), {})
    energy = ours._target((jnp.asarray(task.x), jnp.asarray(task.y)), {}).energy
    algorithm = blackjax.sghmc(
        lambda z, rows: jax.tree.map(jnp.negative, jax.grad(energy)(z, 1.0, {"data": rows})),
        inner,
        alpha=task.friction,
    )
    calls = max(int(task.passes * len(task.x) / BATCH / DRAWS / inner), 1)

    def call(z: Any, key: Any) -> tuple[Any, None]:
        rows = random.randint(key, (BATCH,), 0, len(task.x))
        return algorithm.step(random.fold_in(key, 1), z, rows, task.step_size), None

    def draw(z: Any, key: Any) -> tuple[Any, Any]:
        z = lax.scan(call, z, random.split(key, calls))[0]
        return z, z

    def chain(z: Any, key: Any) -> Any:
        return lax.scan(draw, z, random.split(key, DRAWS + DRAWS // 5))[1]

    kept = jax.tree.map(lambda v: v[:, DRAWS // 5 :], jax.jit(jax.vmap(chain))(states.z, keys))
    constrain = ours.postprocess_fn((task.x, task.y), {})
    draws = jax.block_until_ready(jax.vmap(jax.vmap(constrain))(kept))
    touches = calls * inner * BATCH / len(task.x) * (DRAWS + DRAWS // 5)
    return Found(draws, touches, time.perf_counter() - start)


def train(guide: Any, seed: int, rows: int, passes: float) -> tuple[dict[str, Any], float]:
    """Parameters of a guide after Adam, whose learning rate falls to 0, and the passes."""
    steps = int(passes * len(task.x) / rows)
    adam = optax.adam(optax.cosine_decay_schedule(task.learning_rate, steps))
    svi = SVI(partial(task.model, subsample_size=rows), guide, adam, Trace_ELBO())
    result = svi.run(random.key(seed), steps, task.x, task.y, progress_bar=False)
    return result.params, steps * rows / len(task.x)


def variational_run(kind: Any) -> Found:
    """2,000 draws of a guide."""
    start = time.perf_counter()
    guide = kind(task.model)
    laplace = kind is AutoLaplaceApproximation
    rows, passes = (len(task.x), 5000) if laplace else (BATCH, min(task.passes, 2000))
    params, touches = train(guide, 1, rows, passes)
    draws = guide.sample_posterior(random.key(2), params, task.x, task.y, sample_shape=(1, 2 * DRAWS))
    return Found(draws, touches, time.perf_counter() - start)


def ensemble_run() -> Found:
    """MAP estimates from ten starts."""
    start = time.perf_counter()
    members, touches = [], 0.0
    for seed in range(MEMBERS):
        guide = AutoDelta(task.model)
        params, passes = train(guide, seed, BATCH, min(task.passes, 200))
        members.append(guide.median(params))
        touches += passes
    draws = jax.tree.map(lambda *v: jnp.stack(v)[None], *members)
    return Found(draws, touches, time.perf_counter() - start)


def contestants() -> Iterator[tuple[str, Callable[[], Found]]]:
    """Names and runs."""
    h, c, slow = task.step_size, task.friction, task.langevin
    rows = len(task.x)
    kernels = {
        f"SGHMC, h = {h:g}, C = {c:g}": partial(SGHMC, step_size=h, friction=c),
        f"SGHMC, h = {3 * h:g}, C = {c:g}": partial(SGHMC, step_size=3 * h, friction=c),
        f"SGHMC, h = {h / 3:g}, C = {c:g}": partial(SGHMC, step_size=h / 3, friction=c),
        f"SGHMC, h = {h:g}, C = {3 * c:g}": partial(SGHMC, step_size=h, friction=3 * c),
        f'SGHMC, "symplectic_euler", h = {h:g}': partial(SGHMC, step_size=h, friction=c, integrator="symplectic_euler"),
        f'SGHMC, mass="adapt", h = {h:g}': partial(SGHMC, step_size=h, friction=c, mass="adapt"),
        f"SGNHT, h = {h:g}, C = {c:g}": partial(SGNHT, step_size=h, friction=c),
        f"SGNHT, h = {3 * h:g}, C = {c:g}": partial(SGNHT, step_size=3 * h, friction=c),
        f"SGLD, h = {slow:g}": partial(SGLD, step_size=slow),
        f"SGLD, h = {3 * slow:g}": partial(SGLD, step_size=3 * slow),
        f'SGLD, "lm", h = {3 * slow:g}': partial(SGLD, step_size=3 * slow, integrator="lm"),
        f"PSGLD, h = {task.preconditioned[0]:g}": partial(
            PSGLD, step_size=task.preconditioned[0], damping=task.preconditioned[1]
        ),
    }
    yield f"SGHMC on all rows, h = {3 * h:g}", partial(kernel_run, partial(SGHMC, step_size=3 * h, friction=c), rows)
    for name, make in kernels.items():
        yield name, partial(kernel_run, make)
    yield f"SGHMC, noise compensated, h = {h:g}", compensated_run
    svrg = partial(SGHMC, step_size=3 * h, friction=c, control_variate="svrg")
    yield f"SGHMC, SVRG, h = {3 * h:g}", partial(kernel_run, svrg)
    yield f"SGHMC, control variate at a MAP, h = {3 * h:g}", partial(centred_run, 3 * h)
    yield f"cSGHMC, peak {2 * h:g}", partial(cyclical_run, partial(SGHMC, friction=c), 2 * h)
    yield f"cSGLD, peak {4 * slow:g}", partial(cyclical_run, SGLD, 4 * slow)
    yield f"blackjax sghmc, h = {h:g}, C = {c:g}", blackjax_run
    yield "AutoNormal", partial(variational_run, AutoNormal)
    yield "AutoLaplaceApproximation", partial(variational_run, AutoLaplaceApproximation)
    yield f"ensemble of {MEMBERS}", ensemble_run


def row(name: str, functions: np.ndarray, passes: float, seconds: float, temperatures: str = "-") -> None:
    """Print one row of the table."""
    mean, sd = functions.mean((0, 1)), functions.std((0, 1))
    cells = [f"{np.median(np.abs(mean - truth[0]) / truth[1]):.3f}", f"{np.median(sd / truth[1]):.3f}"]
    cells.append(f"{np.median(np.abs(sd / truth[1] - 1)):.3f}")
    if options.task != "boston":
        distance = 0.5 * np.abs(probabilities(functions) - truth[2]).sum(-1).mean()
        cells.append(f"{distance:.4f}")
    chains = functions.shape[0] > 1
    r_hat = float(function_diagnostics(functions)["r_hat"].quantile(0.95)) if chains else np.nan
    cells += [temperatures, f"{r_hat:.3f}" if chains else "-", f"{passes:.3g}", f"{seconds:.0f}"]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


options = parser.parse_args()
if options.task != "digits" and options.data is None:
    parser.error(f"--task {options.task} needs --data")
task = globals()[options.task](options.data)
if options.passes:
    task = task._replace(passes=options.passes)
reference = nuts()
exact = reference["functions"]
truth = exact.mean((0, 1)), exact.std((0, 1)), None if options.task == "boston" else probabilities(exact)
columns = ["", "mean, in sd", "sd, ratio", "sd, off by", *(["total variation"] if options.task != "boston" else [])]
columns += ["T kin., conf.", "R-hat, 95%", "passes", "seconds"]
print("| " + " | ".join(columns) + " |")
print("| --- " * len(columns) + "|")
cost = float(reference["passes"]), float(reference["seconds"])
row("NUTS", exact, *cost)
for i, half in enumerate(np.array_split(exact, 2)):
    row(f"NUTS, half of the chains ({i + 1})", half, *cost)
for name, run in contestants():
    if options.only is None or name.startswith(tuple(options.only)):
        try:
            found = run()
        except ValueError as error:  # more compensation than a step injects
            print(f"| {name} | refused: {str(error).partition(':')[0]}", flush=True)
            continue
        row(name, functions_of(found.draws), found.passes, found.seconds, found.temperatures)
