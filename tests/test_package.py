"""The package as a whole: what is installed, who imports whom, and that the two backends look alike."""

import ast
import re
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = {"bnn_ppl": ROOT / "bnn_ppl", "bnn_ppl.models": ROOT / "models"}
SOURCES = sorted(path for room in ROOMS.values() for path in room.rglob("*.py"))

# What each backend brings. The other side imports none of it, and shared modules import neither.
BACKENDS = {
    "numpyro": {"jax", "jaxlib", "numpyro", "optax", "flax", "equinox"} | {"bnn_ppl.numpyro", "bnn_ppl.models.numpyro"},
    "pyro": {"torch", "torchvision", "pyro", "bnn_ppl.pyro", "bnn_ppl.models.pyro"},
}
# What shared modules may import beside the standard library and NumPy.
ANALYSIS = {
    "bnn_ppl.export": {"arviz", "xarray"},
    "bnn_ppl.labels": {"xarray"},
    "bnn_ppl.predictions": {"xarray"},
    "bnn_ppl.store": {"arviz", "xarray", "zarr"},
    "bnn_ppl.diagnostics": {"arviz", "scipy", "scoringrules", "xarray"},
    "bnn_ppl.plots": {"arviz", "matplotlib", "xarray"},
}

# The only differences allowed between the two sides.
ONE_SIDED_FILES = {
    "numpyro": {"noise.py", "convolutions.py", "loading.py", "programs.py", "trees.py"},
    "pyro": {"networks.py", "resume.py"},
}
ONE_SIDED_NAMES = {"numpyro": set(), "pyro": {"random_torch_module"}}  # flax and equinox have the host's own
ONE_SIDED_ARGUMENTS = {"numpyro": set(), "pyro": {"jit_compile"}}
OWN_DEFAULTS = {"noise"}
HOST_CONSTRUCTORS = {"AnnealedELBO"}  # classes that take what their host's class takes


def module_name(path: Path) -> str:
    """Name under which a source file is installed."""
    room = "bnn_ppl.models" if path.is_relative_to(ROOMS["bnn_ppl.models"]) else "bnn_ppl"
    parts = path.relative_to(ROOMS[room]).with_suffix("").parts
    return ".".join([room, *(part for part in parts if part != "__init__")])


def source_of(module: str) -> Path | None:
    """File of an installed module of ours, None for a module of others."""
    return next((path for path in SOURCES if module_name(path) == module), None)


def imported(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, at any depth; names taken from a module included."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return names


def within(name: str, owners: set[str]) -> bool:
    """Whether a dotted name is one of `owners` or lies inside one."""
    return any(name == owner or name.startswith(owner + ".") for owner in owners)


def python(code: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run code in a new interpreter outside the repository."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


# The distribution


def test_package_list_equals_tree():
    setuptools = PROJECT["tool"]["setuptools"]
    found = {module_name(path.parent / "__init__.py") for path in SOURCES}
    assert set(setuptools["packages"]) == found
    assert setuptools["package-dir"] == {name: path.name for name, path in ROOMS.items()}
    missing = [str(path.parent) for path in SOURCES if not (path.parent / "__init__.py").exists()]
    assert not missing, "folders without __init__.py"


def test_wheel_contains_every_module(tmp_path):
    # In a copy: a build folder left in the checkout would hide what is missing.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, source)
    for room in ROOMS.values():
        copytree(room, source / room.name, ignore=ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "bnn_ppl/__init__.py").read_text(), re.MULTILINE)
    assert wheel.name == f"bnn_ppl-{version[1]}-py3-none-any.whl"
    installed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"bnn_ppl/py.typed"}
    for path in SOURCES:
        folders = module_name(path.parent / "__init__.py").split(".")
        expected.add("/".join([*folders, path.name]))
    assert installed == expected


def test_extras_all_has_every_run_time_extra():
    extras = PROJECT["project"]["optional-dependencies"]
    assert Requirement(extras["all"][0]).extras == set(extras) - {"all", "bench", "dev"}


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_constraints_pin_each_dependency_within_its_range(version):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": version})]
    pinned = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(pinned) == len(pins)
    extras = PROJECT["project"]["optional-dependencies"].values()
    for line in PROJECT["project"]["dependencies"] + [line for extra in extras for line in extra]:
        dependency = Requirement(line)
        if dependency.name != "bnn_ppl":
            assert dependency.specifier.contains(pinned[dependency.name]), line


# Who imports whom


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_import_boundaries(path):
    name, names = module_name(path), imported(path)
    side = next((side for side in BACKENDS if within(name, BACKENDS[side])), None)
    if side is not None:
        other = "pyro" if side == "numpyro" else "numpyro"
        forbidden = {n for n in names if within(n, BACKENDS[other])}
    else:
        allowed = {"numpy"} | next((ANALYSIS[room] for room in ANALYSIS if within(name, {room})), set())
        ours = {n for n in names if within(n, {"bnn_ppl"})}
        forbidden = {n for n in ours if within(n, BACKENDS["numpyro"] | BACKENDS["pyro"])}
        roots = {n.partition(".")[0] for n in names - ours}
        forbidden |= roots - allowed - sys.stdlib_module_names
        if name != "bnn_ppl" and not within(name, set(ANALYSIS)):
            forbidden |= {n for n in ours if within(n, set(ANALYSIS))}
    assert not forbidden


def test_base_import_loads_no_backend(tmp_path):
    code = """
        import sys
        import bnn_ppl, bnn_ppl.models
        bnn_ppl.to_arviz
        loaded = {"torch", "pyro", "jax", "jaxlib", "numpyro"} & set(sys.modules)
        assert not loaded, loaded
    """
    ran = python(code, tmp_path)
    assert ran.returncode == 0, ran.stderr


CHAINS = {
    "numpyro": """
        import jax, jax.numpy as host, numpyro as ppl, numpyro.distributions as dist
        from numpyro.infer import MCMC
        from bnn_ppl.numpyro import SGHMC

        def run(model, data):
            kernel = SGHMC(model, step_size=0.1, friction=1.0)
            mcmc = MCMC(kernel, num_warmup=2, num_samples=3, progress_bar=False)
            mcmc.run(jax.random.PRNGKey(0), data)
            return mcmc
    """,
    "pyro": """
        import torch as host, pyro as ppl, pyro.distributions as dist
        from pyro.infer import MCMC
        from bnn_ppl.pyro import SGHMC

        def run(model, data):
            ppl.set_rng_seed(0)
            kernel = SGHMC(model, step_size=0.1, friction=1.0)
            mcmc = MCMC(kernel, num_samples=3, warmup_steps=2, disable_progbar=True)
            mcmc.run(data)
            return mcmc
    """,
}
END_TO_END = """
    import importlib, pkgutil
    import bnn_ppl

    def model(x):
        location = ppl.sample("location", dist.Normal(0.0, 1.0))
        with ppl.plate("data", 20, subsample_size=5):
            ppl.sample("x", dist.Normal(location, 1.0), obs=ppl.subsample(x, event_dim=0))

    mcmc = run(model, host.linspace(-1.0, 1.0, 20))
    draws = mcmc.get_samples()["location"]
    assert draws.shape == (3,) and bool(host.isfinite(draws).all()), draws
    assert len(set(draws.tolist())) == 3, draws
    assert bnn_ppl.to_arviz(mcmc)["posterior"]["location"].shape == (1, 3)
    for name in (f"bnn_ppl.{side}", f"bnn_ppl.models.{side}"):
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, name + "."):
            importlib.import_module(module.name)
"""


def blocked(*modules: str) -> str:
    """Code after which importing these modules fails as if they were not installed.

    Finders that find nothing, for packages look whether a module is there in several ways.
    """
    return textwrap.dedent(
        f"""
        import sys

        class Without:
            def __init__(self, finder):
                self.finder = finder

            def __getattr__(self, name):
                return getattr(self.finder, name)

            def find_spec(self, name, path=None, target=None):
                absent = name.partition(".")[0] in {modules!r}
                return None if absent else self.finder.find_spec(name, path, target)

        sys.meta_path[:] = map(Without, sys.meta_path)
        """
    )


@pytest.mark.parametrize(("side", "absent"), [("numpyro", ("torch", "pyro")), ("pyro", ("jax", "jaxlib", "numpyro"))])
def test_backend_works_without_the_other(side, absent, tmp_path):
    prelude = blocked(*absent) + f"side = {side!r}\n"
    ran = python(prelude + textwrap.dedent(CHAINS[side]) + textwrap.dedent(END_TO_END), tmp_path)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("side", "absent"), [("numpyro", "jax"), ("numpyro", "numpyro"), ("pyro", "torch"), ("pyro", "pyro")]
)
def test_missing_backend_names_the_extra(side, absent, tmp_path):
    ran = python(blocked(absent) + f"import bnn_ppl.{side}", tmp_path)
    assert ran.returncode == 1
    message = rf"^ImportError: bnn_ppl\.{side} needs .*'bnn_ppl\[{side}\]'$"
    assert re.search(message, ran.stderr, re.MULTILINE), ran.stderr


# The two sides look alike


def exported(module: str) -> set[str]:
    """Names in the ``__all__`` of a module."""
    for node in ast.parse(source_of(module).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    pytest.fail(f"{module} has no __all__")


def definition(module: str, name: str) -> tuple[str, ast.stmt] | None:
    """Module and node that define a name, through the imports of our modules; None where others do."""
    path = source_of(module)
    if path is None:
        return None
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively, which this test does not follow"
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return definition(node.module, alias.name)
    return None


def signature(function: ast.FunctionDef, side: str) -> dict[str, str]:
    """Arguments in order, each with its kind and default, less the differences that are allowed."""
    a = function.args
    positional = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults
    rows = [(arg, "positional", default) for arg, default in zip(positional, defaults, strict=True)]
    rows += [(a.vararg, "*", None)] * (a.vararg is not None)
    rows += [(arg, "keyword", default) for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    rows += [(a.kwarg, "**", None)] * (a.kwarg is not None)
    return {
        arg.arg: f"{kind} {'its own' if arg.arg in OWN_DEFAULTS else default and ast.unparse(default)}"
        for arg, kind, default in rows
        if arg.arg not in ONE_SIDED_ARGUMENTS[side]
    }


def interface(module: str, name: str, side: str) -> dict[str, dict[str, str]]:
    """Signatures by name of what makes a value: a function itself; a class's constructors, else its fields.

    Other methods are left out: the hosts ask their kernels for different ones. A module has its public functions.
    """
    path = source_of(f"{module}.{name}")
    if path is not None:
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        return {node.name: signature(node, side) for node in functions if not node.name.startswith("_")}
    found = definition(module, name)
    if found is None:
        return {}
    module, node = found
    if isinstance(node, ast.FunctionDef):
        return {name: signature(node, side)}
    members = {}
    for base in reversed(node.bases):
        members |= interface(module, ast.unparse(base), side)
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            decorators = {ast.unparse(decorator) for decorator in item.decorator_list}
            if item.name == "__init__" or (decorators & {"classmethod", "staticmethod"} and item.name[0] != "_"):
                members[item.name] = signature(item, side)
        elif isinstance(item, ast.AnnAssign) and not ast.unparse(item.target).startswith("_"):
            default = ast.unparse(item.value) if item.value else "required"
            members.setdefault("fields", {})[ast.unparse(item.target)] = default
    if "__init__" in members:
        members.pop("fields", None)
    return members


def test_backends_export_the_same_names():
    names = {side: exported(f"bnn_ppl.{side}") for side in BACKENDS}
    assert all(ONE_SIDED_NAMES[side] <= names[side] for side in BACKENDS)
    assert names["numpyro"] - ONE_SIDED_NAMES["numpyro"] == names["pyro"] - ONE_SIDED_NAMES["pyro"]


def test_backends_have_the_same_signatures():
    for name in sorted(exported("bnn_ppl.numpyro") & exported("bnn_ppl.pyro")):
        sides = {side: interface(f"bnn_ppl.{side}", name, side) for side in BACKENDS}
        assert sides["numpyro"] or name in HOST_CONSTRUCTORS, f"the definition of {name} was not found"
        assert sides["numpyro"] == sides["pyro"], name
        for member, arguments in sides["numpyro"].items():
            assert list(arguments) == list(sides["pyro"][member]), f"order of arguments of {name}.{member}"


@pytest.mark.parametrize("room", ROOMS)
def test_backends_have_the_same_files(room):
    files = {}
    for side, one_sided in ONE_SIDED_FILES.items():
        folder = ROOMS[room] / side
        files[side] = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")} - one_sided
    assert files["numpyro"] == files["pyro"]


# The files


def repository_files() -> list[Path]:
    """All files that git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_library_file_over_400_lines():
    files = [path for room in ROOMS.values() for path in room.rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: count for name, count in lines.items() if count > 400} == {}


FOREIGN = re.compile(
    r"(?<![\w.$)}\]])/(?:home|root|work|opt|mnt|srv|Users|workspace)/\w"  # folders of one machine
    r"|(?:index[-]url|find[-]links|trusted[-]host)\b"  # options that name a package registry
    r"|https?://(?:\d+\.){3}\d+|https?://localhost"
    r"|https?://(?!pypi\.org)[\w.-]*(?:pypi|registry|artifact|nexus)[\w.-]*"
    r"|[@=]\s*file://"
)


def test_no_machine_paths_or_registry_hosts():
    found = {}
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" not in content and (hits := FOREIGN.findall(content.decode(errors="replace"))):
            found[str(path.relative_to(ROOT))] = hits
    assert not found
