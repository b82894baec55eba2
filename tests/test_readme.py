"""The README's code runs and says what its comments promise; every example runs at its smoke size."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOUND = re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
BACKENDS = ["numpyro", "pyro"]
EXAMPLES = [
    "cold_posterior",
    "mixture",
    "mnist",
    "out_of_distribution",
    "targets",
    "uci_regression",
    "variance_toy",
    "variational_dropout",
    "variational_dropout --study parameterizations --hidden --batch-norm",
    "weight_averaging",
    "weight_norm",
]


def run(*arguments: str, folder: Path) -> str:
    """Output of a Python process of its own, for examples set seeds and draw plots."""
    environment = os.environ | {"MPLBACKEND": "Agg", "CI": "true"}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_readme_blocks(backend, tmp_path):
    blocks = [block for name, block in FOUND if name == backend]
    assert len(blocks) >= 2
    output = run("-c", "\n".join(blocks), folder=tmp_path)
    # The noise of the data is 0.1; its posterior sd is 0.1 / sqrt(2 * 512) = 0.003.
    assert abs(float(output.splitlines()[0]) - 0.1) < 0.03


@pytest.mark.parametrize("backend", BACKENDS)
def test_quickstart(backend, tmp_path):
    output = run(str(ROOT / "examples" / f"quickstart_{backend}.py"), "--smoke", "--out", "out", folder=tmp_path)
    assert float(re.search(r"accuracy (\d\.\d+)", output)[1]) > 0.9
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"{backend}_{name}" for name in ("report.png", "trace.png", "rank.png")} | {f"{backend}.nc"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example, backend, tmp_path):
    name, *options = example.split()
    script = str(ROOT / "examples" / f"{name}.py")
    output = run(script, "--smoke", "--backend", backend, *options, folder=tmp_path)
    assert "| --- |" in output
    assert not re.search(r"\bnan\b", output)
