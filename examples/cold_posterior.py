"""Is a cold posterior better? Scores of SGHMC over the temperature.

    python examples/cold_posterior.py
    python examples/cold_posterior.py --data FOLDER --dataset mnist --epochs 20 --chains 2

Each temperature averages the second half of the same number of chains, so that T = 0 is an ensemble of SGD runs.
"""

import matplotlib.pyplot as plt
import pandas as pd
from training import make_parser, prepare, print_table, sample

parser = make_parser(__doc__.partition("\n")[0], dataset="digits", epochs=200, chains=4)
parser.add_argument("--temperatures", type=float, nargs="+", default=[1, 0.3, 0.1, 0.03, 0.01, 0.001, 0])
options = parser.parse_args()
if options.smoke:
    options.temperatures = [1, 0]
images = prepare(options)

scores = {temperature: sample(options, images, temperature).scores(images) for temperature in options.temperatures}
table = pd.DataFrame(scores).T
print_table(scores)

measures = ["error %", "NLL", "ECE %"]
temperatures = table.index.to_numpy()
figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
for axis, measure in zip(axes, measures, strict=False):
    axis.plot(temperatures, table[measure], marker="o")
    axis.set_ylabel(f"{measure} on the test images")
for measure in ("T kinetic", "T config."):
    axes[3].plot(temperatures, table[measure], marker="o", label=measure)
axes[3].plot(temperatures, temperatures, color="grey", linestyle=":", label="as asked for")
axes[3].set_ylabel("measured temperature")
axes[3].legend()
smallest = temperatures[temperatures > 0].min()
axes[3].set_yscale("symlog", linthresh=smallest)
for axis in axes:
    axis.set_xscale("symlog", linthresh=smallest)
    axis.set_xlabel("temperature T")
figure.suptitle(f"{options.dataset}, {options.model}, SGHMC with {options.backend}")
options.out.mkdir(exist_ok=True)
path = options.out / f"cold_posterior_{options.dataset}_{options.backend}.png"
figure.savefig(path, dpi=110)
print(f"wrote {path}")
