"""Is a small weight norm good, or a low temperature? Plain, resampled and norm-adjusting SGHMC on MNIST.

    python examples/weight_norm.py --data FOLDER
    python examples/weight_norm.py --data FOLDER --dataset cifar10 --model lenet5 --epochs 100    # on a GPU

The norm-adjusting notes compare NLLs by |theta|^2. Their momentum refresh at beta M, with a mass of alpha M, changes
the temperature too: without friction the chain samples at beta / alpha, and only beta = alpha T leaves it at T. So
the picture has the NLL against |theta|^2 on the left, and against the measured (configurational) temperature on the
right: if the families lie on one curve there, the temperature explains what the norm seemed to. Each row averages the
second half of the epochs of all chains.
"""

from functools import partial
from importlib import import_module

import matplotlib.pyplot as plt
from training import make_parser, prepare, print_table, sample

from bnn_ppl.diagnostics import describe_temperature

parser = make_parser(__doc__.partition("\n")[0], chains=2)
parser.add_argument("--boost", type=float, default=3.0, help="alpha")
parser.add_argument("--adjust", type=float, default=0.001, help="gamma")
parser.add_argument("--resample-every", type=int, default=10, help="gradient steps between momentum refreshes")
options = parser.parse_args()
temperatures = [1.0] if options.smoke else [1.0, 0.3, 0.1, 0.03, 0.01]
adjusted = [(1.0, 0.001), (1.0, 0.03), (1.0, 0.3), (1.0, 3.0), (0.01, 0.001)][: 1 if options.smoke else None]  # T, beta
images = prepare(options)
backend = import_module(f"bnn_ppl.{options.backend}")

runs = {("plain", f"T = {temperature:g}"): sample(options, images, temperature) for temperature in temperatures}
resampled = partial(backend.SGHMC, resample_every=options.resample_every)
for temperature in temperatures[::2]:
    runs["resampled", f"T = {temperature:g}"] = sample(options, images, temperature, resampled)
for temperature, scale in adjusted:
    adjusting = partial(
        backend.norm_adjusting_sghmc,
        boost=options.boost,
        adjust=options.adjust,
        momentum_scale=scale,
        resample_every=options.resample_every,
    )
    run = sample(options, images, temperature, adjusting)
    runs["norm-adjusting", f"T = {temperature:g}, beta = {scale:g}"] = run
    print(f"T = {temperature:g}, beta = {scale:g}: {describe_temperature({'sample_stats': run.statistics})}")

scores = {}
for (family, settings), run in runs.items():
    norm = {"|theta|^2": float(run.statistics["position_norm_sq"].mean())}
    scores[f"{family}, {settings}"] = norm | run.scores(images)
print_table(scores)

figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
for axis, measure, label in zip(
    axes, ("|theta|^2", "T config."), ("|θ|², mean over the draws", "configurational temperature"), strict=True
):
    for marker, family in zip("os^", dict.fromkeys(family for family, _ in runs), strict=True):
        rows = [scores[name] for name in scores if name.startswith(family)]
        axis.plot([row[measure] for row in rows], [row["NLL"] for row in rows], marker, label=family)
    axis.set_xlabel(label)
axes[0].set_xscale("log")
axes[0].set_xticks([300, 1000, 3000, 10_000], ["300", "1000", "3000", "10000"])
axes[0].xaxis.set_minor_formatter("")
axes[1].set_xscale("symlog", linthresh=0.03)  # of a chain that is not at rest it may be negative
axes[0].set_ylabel("NLL on the test images, nats")
axes[0].legend()
figure.suptitle(f"{options.dataset}, {options.model}, SGHMC with {options.backend}")
options.out.mkdir(exist_ok=True)
path = options.out / f"weight_norm_{options.dataset}_{options.backend}.png"
figure.savefig(path, dpi=110)
print(f"wrote {path}")
