"""Shipped code imports without ComfyUI and does nothing that a node pack must not do."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfyui_version", "folder_paths", "nodes"}
COMMAND_LINE = ("qandc_core/cli/",)  # what `python -m` runs


def shipped_sources():
    """Paths, relative to the root, of the Python files in the archive that the registry publishes."""
    left_out = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    paths = [ROOT / "__init__.py", *(ROOT / "nodes").rglob("*.py"), *(ROOT / "qandc_core").rglob("*.py")]
    names = sorted(path.relative_to(ROOT).as_posix() for path in paths)
    return [name for name in names if not name.startswith(tuple(left_out))]


SOURCES = shipped_sources()


def tree(name):
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def dotted(node):
    """The name that an expression is made of: torch.load -> "torch.load", and "" where it is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(name):
    return [(dotted(node.func), node) for node in ast.walk(tree(name)) if isinstance(node, ast.Call)]


def imported_modules(name):
    """Top-level modules that are imported by their absolute name, anywhere in the file."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_root_imports_without_comfyui():
    code = f"""
import importlib.util, inspect, sys
spec = importlib.util.spec_from_file_location(
    "pack", {str(ROOT / "__init__.py")!r}, submodule_search_locations=[{str(ROOT)!r}])
pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
for name in {sorted(COMFYUI)}:
    sys.modules[name] = None  # importing it raises ImportError
spec.loader.exec_module(pack)
assert inspect.iscoroutinefunction(pack.comfy_entrypoint)
assert "torch" not in sys.modules
print(pack.WEB_DIRECTORY)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert (ROOT / done.stdout.strip() / "docs").is_dir()


def test_sources_are_found():
    assert {"__init__.py", "nodes/extension.py", "qandc_core/__init__.py"} <= set(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_source_runs_no_code_from_data_and_no_process(name):
    for function, call in calls(name):
        place = f"{name}:{call.lineno}"
        assert function not in ("eval", "exec", "compile", "__import__"), place
        assert function not in ("os.system", "os.popen") and not function.startswith(("os.exec", "os.spawn")), place
        if function == "torch.load":
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            assert isinstance(given.get("weights_only"), ast.Constant) and given["weights_only"].value is True, place
    assert "subprocess" not in imported_modules(name)


@pytest.mark.parametrize("name", SOURCES)
def test_source_leaves_python_and_the_device_alone(name):
    for node in ast.walk(tree(name)):
        place = f"{name}:{getattr(node, 'lineno', 0)}"
        assert dotted(node) != "sys.path", place
        # Devices are ComfyUI's to choose; torch.cuda.* only asks.
        is_method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        assert not (is_method and node.func.attr == "cuda"), place
        from_sys = isinstance(node, ast.ImportFrom) and node.module == "sys"
        assert not (from_sys and any(alias.name == "path" for alias in node.names)), place


@pytest.mark.parametrize("name", SOURCES)
def test_only_the_command_line_prints(name):
    if not name.startswith(COMMAND_LINE):
        assert not [call.lineno for function, call in calls(name) if function == "print"]


@pytest.mark.parametrize("name", SOURCES)
def test_imports_keep_engine_and_comfyui_apart(name):
    found = set(imported_modules(name))
    assert "nodes" not in found, "that name belongs to ComfyUI"
    assert "qandc_core" not in found, "inside ComfyUI the package has another name; import it relatively"
    if name.startswith("qandc_core/"):
        assert not found & COMFYUI


@pytest.mark.parametrize("name", SOURCES)
def test_source_is_readable_on_windows(name):
    # Tools there read files in the code page of the system.
    (ROOT / name).read_text(encoding="utf-8").encode("cp1252")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """What the registry publishes of the engine."""
    folder = tmp_path_factory.mktemp("archive")
    for name in SOURCES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for weights in (ROOT / "qandc_core").rglob("*.safetensors"):
        shutil.copy(weights, folder / weights.relative_to(ROOT))
    return folder


def run_in(folder, *argv):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_archive_is_the_package_as_it_stands(archive):
    left_out = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    assert not [pattern for pattern in left_out if pattern.startswith(("qandc_core", "nodes", "web", "locales"))]
    modules = [name[:-3].replace("/", ".") for name in SOURCES if name.startswith("qandc_core/")]
    needs_triton = importlib.util.find_spec("triton") is None
    able = [m for m in modules if not m.endswith("__main__") and not (needs_triton and "triton" in m)]
    code = f"""
import importlib, qandc_core
for name in {able}:
    importlib.import_module(name)
print(qandc_core.__file__)
"""
    assert run_in(archive, "-c", code).startswith(str(archive))


def test_every_command_of_the_archive_works(archive):
    """Each one's help, and what four of them make of a small model."""
    code = """
import torch
from qandc_core import DiT, DiTConfig, save_dit
from qandc_core.cli.main import main

torch.set_num_threads(1)
for command in ("demo", "generate", "calibrate", "quantize", "experiment", "bench"):
    try:
        main([command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0, command
size = dict(input_size=8, in_channels=3, hidden_size=32, depth=1, num_heads=2, num_classes=5, learn_sigma=False)
save_dit(DiT(DiTConfig(**size)), "model.safetensors")
model, run = ["--model", "model.safetensors"], ["--steps", "3", "--cfg", "2"]
few = ["--trajectories", "4", "--samples", "4", "--pairs", "2"]
for argv in (
    ["bench", *model, *run, "--images", "2"],
    ["calibrate", *model, *run, *few, "--out", "made.safetensors"],
    ["quantize", *model, "--calibration", "made.safetensors", "--out", "small.safetensors"],
    ["generate", "--model", "small.safetensors", *run, "--calibration", "made.safetensors", "--classes", "1"],
):
    assert main(argv) == 0, argv
"""
    out = run_in(archive, "-c", code)
    assert out.count("usage: python -m qandc_core") == 6 and "ms computed" in out
    assert (archive / "out" / "images.png").is_file()
