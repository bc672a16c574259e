"""The speed benchmark of `python -m benchmarks.comfyui`, run on a small model without compiling."""

from __future__ import annotations

import pytest

from benchmarks.comfyui.__main__ import measure
from benchmarks.comfyui.tables import report

from .checkouts import parameters
from .inside_programs import install_pack, run_program

STEPS = 6
OPTIONS = {
    "model": "dit", "width": 144, "depth": 1, "batch": 1, "steps": STEPS, "cfg": 1.5, "rounds": 1, "device": "cpu",
    "only": "", "compiles": False, "arguments": "", "flow": "", "warm": 0, "dynamic": False, "seconds": 1e9,
}  # fmt: skip
ROWS = [
    "stock", "half the steps", "EasyCache", "W8A8", "W8A8 + EasyCache", "Apply Cache 2x", "Apply Cache 3x",
    "W8A8 + Apply Cache 2x", "W8A8 + Apply Cache 3x", "W4A8", "W4A8 + Apply Cache 2x",
]  # fmt: skip
W4A8_SINCE = (0, 31)


@pytest.fixture(scope="module", params=parameters()[:1])
def run(request) -> dict:
    if request.param.version < W4A8_SINCE:
        pytest.skip("W4A8 needs ComfyUI 0.31")
    *_, last = measure(request.param, OPTIONS, threads=1)
    return last


@pytest.fixture(scope="module")
def rows(run) -> dict[str, dict]:
    return {row["variant"]: row for row in run["rows"]}


def test_every_row_is_measured(rows):
    assert list(rows) == ROWS
    assert {name: row["fails"] for name, row in rows.items() if "fails" in row} == {}
    assert all(len(row["rounds"]) == 1 and row["rounds"][0]["seconds"] > 0 for row in rows.values())


def test_modulations_are_quantized_too(rows):
    """Four layers of the block and its modulation; the last layer and its modulation stay."""
    assert rows["W8A8"]["layers"] == {"W8A8": 5} and rows["W4A8"]["layers"] == {"W4A8": 5}


def test_only_stock_has_no_error(rows):
    errors = {name: row["rounds"][0]["error"] for name, row in rows.items()}
    assert errors.pop("stock") == 0 and all(0 < error < 1 for error in errors.values())
    assert errors["W8A8"] < errors["W4A8"]


def test_as_many_steps_are_computed_as_the_variant_says(rows, subtests):
    """Apply Cache computes at most its share of the steps, fewer where reuse costs something."""
    for name in ROWS:
        with subtests.test(name):
            computed = rows[name]["rounds"][0]["computed"]
            if "Apply Cache" in name:
                assert 1 <= computed <= STEPS // int(name[-2])
            elif "EasyCache" in name:
                assert 1 <= computed <= STEPS
            else:
                assert computed == (STEPS // 2 if name == "half the steps" else STEPS)


def test_steps_are_timed_by_whether_they_were_computed(rows):
    for row in rows.values():
        (found,) = row["rounds"]
        assert (found["reused_step"] is None) == (found["computed"] == row["steps"])
        if found["computed"] > 1:
            assert 0 < found["computed_step"] < found["seconds"]


def test_quantized_models_are_smaller(rows):
    assert rows["W4A8"]["model_bytes"] < rows["W8A8"]["model_bytes"] < rows["stock"]["model_bytes"]
    assert list(rows["W8A8"]["layers"]) == ["W8A8"] and list(rows["W4A8"]["layers"]) == ["W4A8"]
    assert all(row["peak_bytes"] >= row["model_bytes"] for row in rows.values())


def test_models_have_their_released_sizes(tmp_path_factory):
    """Detection finds what the benchmark made them of; billions of parameters as their model cards say."""
    newest = next((p.values[0] for p in parameters() if not p.marks), None)
    if newest is None:
        pytest.skip("no ComfyUI that starts here")
    base = tmp_path_factory.mktemp("sizes")
    install_pack(base)
    found = run_program(newest, "released_sizes", base)
    billions = {"flux-dev": 11.9, "z-image": 6.15, "sdxl": 2.57, "wan-1.3b": 1.42}
    assert {name: round(size.pop("billions"), 2) for name, size in found.items()} == pytest.approx(billions, rel=0.01)
    classes = {"flux-dev": "Flux", "z-image": "ZImage", "sdxl": "SDXL", "wan-1.3b": "WAN21_T2V"}
    assert found == {name: {"class": kind, "other": {}} for name, kind in classes.items()}


def test_the_table_holds_every_row_and_what_failed(run):
    failed = {"variant": "TorchCompileModel", "steps": STEPS, "rounds": [], "fails": "RuntimeError: no compiler"}
    text = report({"small": {**run, "command": "python -m benchmarks.comfyui", "rows": [*run["rows"], failed]}})
    assert all(f"| {name} |" in text for name in ROWS)
    assert "| TorchCompileModel | fails: RuntimeError: no compiler |" in text
    assert "GPU: not measured." in text
