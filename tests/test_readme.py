"""The README's code runs and says what its comments promise; every example runs at its smoke size."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(*arguments: str, folder: Path) -> str:
    """Output of a Python process of its own, for examples set seeds and draw plots."""
    environment = os.environ | {"MPLBACKEND": "Agg", "CI": "true"}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_both_backends_have_a_block():
    assert set(BLOCKS) == {"numpyro", "pyro"}


@pytest.mark.parametrize("backend", ["numpyro", "pyro"])
def test_readme_block(backend, tmp_path):
    output = run("-c", BLOCKS[backend], folder=tmp_path)
    # The noise of the data is 0.1; its posterior sd is 0.1 / sqrt(2 * 512) = 0.003.
    assert abs(float(output) - 0.1) < 0.03


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, tmp_path):
    output = run(str(example), "--smoke", "--out", "out", folder=tmp_path)
    assert float(re.search(r"test accuracy (\S+)", output)[1]) > 0.9
    backend = example.stem.removeprefix("quickstart_")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"{backend}_trace.png", f"{backend}_rank.png", f"{backend}.nc"}
