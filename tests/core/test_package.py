import ast
import importlib
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import qandc_core

PACKAGE = Path(qandc_core.__file__).parent
ROOT = PACKAGE.parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"diffusers", "sklearn", "scipy", "comfy", "comfy_kitchen", "matplotlib", "PIL", "transformers"}
NEEDED = inspect.Parameter.empty

# The public API as DESIGN.md writes it: positional parameters in order, with their defaults.
SIGNATURES = {
    "load_dit": {"source": NEEDED, "dtype": None, "device": None},
    "quantize_model": {"model": NEEDED, "w_bits": 8, "a_bits": 8, "skip_patterns": (), "calibration": None},
    "apply_cache_to_dit": {"model": NEEDED, "cache_interval": None},
    "reset_all_caches": {"model": NEEDED},
    "remove_cache": {"model": NEEDED},
    "tap_select": {
        "features": NEEDED, "timesteps": NEEDED, "num_samples": 800, "num_clusters": 100, "num_subsamples": 3,
        "subsample_fraction": 0.05, "alpha": 0.5, "time_scale": 1.0, "seed": 0,
    },
    "variance_factors": {"reference": NEEDED, "accelerated": NEEDED, "method": "variance_match", "eps": 1e-2},
    "optimal_schedule": {"distances": NEEDED, "num_computed": NEEDED},
    "generate": {
        "model": NEEDED, "class_labels": NEEDED, "steps": None, "cfg_scale": 4.0, "sampler": "ddpm", "seed": 0,
        "sigmas": None, "noise": None,
    },
}  # fmt: skip


def pyproject():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def trees():
    for path in SOURCES:
        yield path.relative_to(ROOT), ast.parse(path.read_text())


def dotted(node):
    """The name that a call is made by: torch.load(...) -> torch.load."""
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def calls():
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield f"{path}:{node.lineno}", dotted(node.func), node


def test_import_loads_nothing_heavy():
    code = "import sys; import qandc_core; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert not HEAVY & set(done.stdout.split())
    assert not done.stderr


def test_a_calibration_file_is_read_without_kernels_and_without_the_fused_engine():
    code = "import sys; from qandc_core.calibration.file import load_calibration; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "qandc_core.calibration.file" in loaded
    assert not {
        name for name in loaded if name.startswith(("qandc_core.fused", "qandc_core.sampling.generate", "triton"))
    }


def test_every_room_has_its_place_in_the_order_of_imports():
    contract = pyproject()["tool"]["importlinter"]["contracts"][0]
    ordered = {room.strip("()") for layer in contract["layers"] for room in layer.split(" | ")}
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__", "__main__"} <= ordered


def test_the_order_of_imports_is_kept():
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    # In a process of its own: import-linter's logging disables every logger that there is.
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_import_loads_no_fused_engine():
    code = (
        "import sys; import qandc_core; print([m for m in sys.modules if 'qandc_core.fused' in m]); qandc_core.fuse_dit"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_nothing_below_the_fused_engine_imports_it():
    above = ("fused", "evaluation", "cli")
    for path, tree in trees():
        if path.parts[1] in (*above, "__init__.py"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert not (node.module or "").startswith("fused"), f"{path}:{node.lineno}"


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_function_has_the_documented_signature(name):
    found = inspect.signature(getattr(qandc_core, name)).parameters
    documented = SIGNATURES[name]
    assert {k: p.default for k, p in list(found.items())[: len(documented)]} == documented
    assert list(found)[: len(documented)] == list(documented)
    further = list(found.values())[len(documented) :]
    assert all(p.default is not NEEDED for p in further), "an added argument must be optional"
    assert name in qandc_core.__all__


def test_all_lists_what_is_there():
    assert len(set(qandc_core.__all__)) == len(qandc_core.__all__)
    assert all(hasattr(qandc_core, name) for name in qandc_core.__all__)


def test_version_is_that_of_the_project():
    assert qandc_core.__version__ == pyproject()["project"]["version"]


def test_documented_defaults_are_accepted_by_the_classes_they_name():
    assert set(inspect.signature(qandc_core.TapSelection).parameters) >= {"indices", "labels"}
    assert {"total_seconds", "computed_steps", "summary", "to_dict"} <= set(dir(qandc_core.RunReport))


def test_no_module_imports_comfy_or_itself_by_its_absolute_name():
    # Inside ComfyUI the package has another name, so only relative imports work.
    for path, tree in trees():
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            tops = {name.split(".")[0] for name in names}
            assert not tops & {"comfy", "comfy_extras", "nodes", "folder_paths", "qandc_core"}, f"{path}:{node.lineno}"


def test_no_module_runs_code_from_data():
    for place, name, node in calls():
        assert name not in ("eval", "exec", "compile", "__import__"), place
        assert not re.match(r"(pickle|cPickle|dill|joblib|shelve|marshal)\.", name), place
        if name == "torch.load":
            given = {k.arg: k.value for k in node.keywords}
            assert isinstance(given.get("weights_only"), ast.Constant) and given["weights_only"].value is True, place
        if name in ("np.load", "numpy.load"):
            given = {k.arg: k.value for k in node.keywords}
            assert isinstance(given.get("allow_pickle"), ast.Constant) and given["allow_pickle"].value is False, place
        assert not name.startswith("os.system") and "shell" not in {k.arg for k in node.keywords}, place


def test_the_checks_above_see_what_they_look_for():
    names = [dotted(n.func) for n in ast.walk(ast.parse("torch.load(x); eval(y); m.eval()")) if isinstance(n, ast.Call)]
    assert sorted(names) == ["eval", "m.eval", "torch.load"]
    assert {"torch.load", "np.load"} <= {name for _, name, _ in calls()}


def test_no_path_of_a_machine_is_written_anywhere():
    pattern = re.compile(r"""["'](?:/(?:home|root|work|tmp|mnt|Users|usr|opt|var)\b|[A-Za-z]:\\)""")
    for path in [*SOURCES, ROOT / "pyproject.toml", ROOT / "Makefile"]:
        assert not pattern.search(path.read_text()), path


def test_only_the_command_line_and_the_training_scripts_print():
    allowed = ("cli/", "demo/")
    for place, name, _ in calls():
        assert name != "print" or any(part in place for part in allowed), place


def test_sources_are_ascii():
    for path in [*SOURCES, *(ROOT / "tests" / "core").glob("*.py"), ROOT / "pyproject.toml", ROOT / "Makefile"]:
        assert path.read_bytes().isascii(), path


def test_files_and_functions_are_short():
    for path, tree in trees():
        assert tree.body or path.name == "__init__.py", path
        lines = (ROOT / path).read_text().count("\n")
        assert lines <= 300, f"{path} has {lines} lines"
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 60, f"{path}:{node.lineno} {node.name}"


def test_lines_are_set_by_hand_in_kernels_alone():
    sources = [*(ROOT / "qandc_core").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]
    by_hand = {path.name for path in sources if "fmt: skip" in path.read_text(encoding="utf-8")}
    assert by_hand <= {"triton_matmul.py", "triton_ops.py", "triton_quantize.py"}


def test_requirements_are_what_comfyui_lacks():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert sorted(lines) == ["diffusers", "scikit-learn"]


def test_torch_is_pinned_in_the_extras_alone():
    project = pyproject()["project"]
    plain = {r.name: r for r in map(Requirement, project["dependencies"])}
    assert not plain["torch"].specifier
    assert set(plain) >= {"torch", "safetensors", "scipy", "scikit-learn", "diffusers", "comfy-kitchen", "pillow"}
    for name in ("demo", "test"):
        torch = next(r for r in map(Requirement, project["optional-dependencies"][name]) if r.name == "torch")
        assert set(str(torch.specifier).split(",")) == {">=2.7", "<2.14"}
        assert torch.specifier.contains("2.13.0") and not torch.specifier.contains("2.14.0")
    extras = {Requirement(r).name for r in project["optional-dependencies"]["test"]}
    assert extras >= {"pytest", "hypothesis", "ruff", "mypy", "matplotlib"}


def test_what_is_imported_is_declared():
    declared = {Requirement(r).name for r in pyproject()["project"]["dependencies"]} | {"matplotlib"}
    declared |= {"sklearn", "PIL", "comfy_kitchen", "numpy"}  # numpy comes with scipy and scikit-learn
    declared |= {"triton"}  # comes with torch where it has CUDA
    imported = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= declared


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    setuptools = importlib.util.find_spec("setuptools")
    if setuptools is None or int(importlib.import_module("setuptools").__version__.split(".")[0]) < 77:
        pytest.skip("building the wheel needs setuptools 77 or newer")
    folder = tmp_path_factory.mktemp("build")
    # A copy, because setuptools leaves build/ and *.egg-info where it builds.
    left_out = shutil.ignore_patterns(".git", "out", "build", "*.egg-info", "__pycache__", ".venv")
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = subprocess.run([*pip, "-w", str(folder), str(folder / "source")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_contains_the_engine_and_nothing_else(wheel):
    names = [n for n in wheel.namelist() if ".dist-info/" not in n]
    assert {n.split("/")[0] for n in names} == {"qandc_core"}
    shipped = {
        p.relative_to(ROOT).as_posix()
        for p in [*SOURCES, *PACKAGE.glob("demo/*.safetensors"), *PACKAGE.glob("demo/*.md")]
    }
    assert set(names) == shipped
    assert "qandc_core/demo/pictures_judge.safetensors" in shipped
    assert wheel.testzip() is None


def test_wheel_metadata(wheel):
    info = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    text = wheel.read(info).decode()
    assert re.search(r"^Name: qandc$", text, re.M) and re.search(r"^License-Expression: Apache-2.0$", text, re.M)
    assert re.search(r"^Requires-Dist: torch$", text, re.M)
    pinned = re.findall(r"^Requires-Dist: torch[<>=].*", text, re.M)
    assert pinned and all("extra ==" in line for line in pinned)
    assert any(n.endswith("licenses/LICENSE") for n in wheel.namelist())
