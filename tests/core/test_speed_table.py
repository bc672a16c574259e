"""The speed table on a model small enough for a CPU, its goals and its Markdown."""

import copy
import json
from dataclasses import asdict

import pytest
import torch

from benchmarks.gpu.goals import goals
from benchmarks.gpu.report import GPU_GOALS, markdown
from benchmarks.speed import gemms
from benchmarks.speed import table as table_module
from benchmarks.speed.ceilings import Ceilings, best_of
from benchmarks.speed.models import (
    PACKED,
    PAPER,
    QANDC,
    Maker,
    float_subjects,
    integer_subjects,
    model_bytes,
    random_dit,
    resize,
)
from benchmarks.speed.runs import Bench, Measured, Setting, schedules
from qandc_core.fused.kernels import reference
from qandc_core.models import DiTConfig, preset

CPU = torch.device("cpu")
CONFIG = DiTConfig(input_size=16, hidden_size=64, depth=2, num_heads=2)
SETTING = Setting(pixels=64, images=2, steps=6)

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def source():
    return random_dit(CONFIG)


@pytest.fixture(scope="module")
def subjects():
    return {subject.name: subject for subject in (*float_subjects(CPU), *integer_subjects(CPU, "kitchen"))}


def test_random_weights_keep_activations_their_size(source):
    x = torch.randn(8, 4, 16, 16)
    seen = []
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out.std())) for block in source.blocks]
    out = source(x, torch.full((8,), 500), torch.arange(8))
    for hook in hooks:
        hook.remove()
    assert all(0.1 < float(std) < 10 for std in seen) and 1e-3 < float(out.std()) < 10


def test_a_model_takes_other_sizes(source):
    model = copy.deepcopy(source)
    resize(model, 8)
    assert model.pos_embed.shape == (1, 16, 64)
    assert model(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.tensor([1])).shape == (1, 8, 8, 8)


def test_rows_of_a_setting(source, subjects):
    notes = []
    bench = Bench(CPU, SETTING, notes.append, repeats=1)
    rows = {}
    for name in ("fp32 eager", QANDC, PACKED, f"{QANDC}, float modulations"):
        model = subjects[name].make(source)
        for schedule, cache in schedules(SETTING.steps).items():
            rows[name, schedule] = bench.measure(subjects[name], lambda _, model=model: model, schedule, cache)
    assert not any(row["problem"] for row in rows.values()) and len(notes) == len(rows)
    assert rows["fp32 eager", "all steps"]["error"] == 0 and rows["fp32 eager", "all steps"]["baseline"]
    assert [rows[PACKED, schedule]["computed_steps"] for schedule in schedules(6)] == [6, 2, 2]
    w8, w4 = (rows[name, "all steps"]["error"] for name in (QANDC, PACKED))
    assert 0 < w8 < w4 < 0.2
    assert rows["fp32 eager", "interval 3"]["reused"] < 0.5 * rows["fp32 eager", "interval 3"]["computed"]
    assert rows[QANDC, "all steps"]["weights"] < rows[f"{QANDC}, float modulations", "all steps"]["weights"]


def test_a_run_that_takes_too_long_is_taken_to_be_its_steps(source, subjects):
    bench = Bench(CPU, SETTING, print, longest=0.0)
    bench.reference = torch.zeros(1)
    row = bench.measure(
        subjects["fp32 eager"], lambda subject: subject.make(source), "interval 3", schedules(6)["interval 3"]
    )
    assert row["extrapolated"] and not row["totals"]
    assert row["total"] == pytest.approx(2 * row["computed"] + 4 * row["reused"])


def test_a_subject_that_fails_says_why(source, subjects):
    def broken(*_):
        raise RuntimeError("no kernel image\nis available")

    row = Bench(CPU, SETTING, print).measure(subjects["fp32 eager"], broken, "all steps", None)
    assert row["problem"] == "RuntimeError: no kernel image" and row["total"] is None


def test_static_layers_have_grids_of_what_they_meet(source):
    layer = Maker(CPU, "reference").static(source).blocks[0].qkv
    assert layer.inputs is not None and float(layer.inputs.scale) > 0


def test_bytes_count_every_tensor_once(source):
    expected = sum(p.numel() * 4 for p in source.parameters()) + source.pos_embed.nbytes
    assert model_bytes(source) == expected
    quantized = Maker(CPU, "kitchen").native(source, "W8A8")
    assert model_bytes(quantized) < 0.6 * expected


def row(subject, schedule="all steps", setting="256 px, batch 8", **values):
    plain = {"computed": 0.02, "reused": None, "total": 1.0, "error": 0.0, "weights": 100}
    return asdict(Measured(subject, setting, schedule, 50, 50, **{**plain, **values}))


def table(rows):
    ceilings = asdict(Ceilings(1e13, None, 2e14, 4e14, 1e12, None))
    product = {"seconds": 1e-4, "rate": 3e14, "share": 0.75}
    gemms = [
        {"rows": 4096, "columns": 3456, "inner": 1152, "methods": {"triton_int8_matmul": product, "int_mm": None},
         "error": {"int_mm": "RuntimeError: no"}}
    ]  # fmt: skip
    return {
        "name": "DiT-XL/2", "command": "python -m benchmarks.gpu",
        "hardware": {"device": "card", "threads": 1, "cuda": True},
        "versions": {"torch": "2"}, "kernels": "triton", "ceilings": ceilings, "rows": rows, "gemms": gemms,
    }  # fmt: skip


def test_goals_come_from_rows_and_stay_open_without():
    rows = [
        row("bf16 eager", baseline=True), row("bf16 compiled", total=0.8, computed=0.016, baseline=True),
        row("bf16 fused", total=0.1),
        row(PAPER, total=30.0), row(QANDC, "chosen steps", total=0.2, computed=0.01, reused=1e-4, error=0.02),
        row(QANDC, computed=0.0098, total=0.5, weights=52),
        row("bf16 compiled", "10 steps in the time of Q&C", error=0.05),
        row(QANDC, setting="256 px, batch 32", problem="RuntimeError: out of memory"),
    ]  # fmt: skip
    values = [goal.value for goal in goals(table(rows))]
    assert values[:3] == [pytest.approx(150), pytest.approx(4), pytest.approx(0.4)]
    assert values[3] is None and values[4] == 0.75 and values[5] == pytest.approx(0.01)
    assert values[6] == pytest.approx(0.02) and values[7] is None and values[8] == pytest.approx(0.52)
    assert [goal.met for goal in goals(table(rows))] == [True, True, True, None, True, True, False, None, True, None]
    assert all(goal.value is None for goal in goals({**table(rows[:1]), "gemms": []}))


def test_other_settings_begin_with_what_matters_and_end_with_what_may_fail():
    benches = {name: name for name in ("main", "second", "third")}
    subjects = [*float_subjects(CPU), *integer_subjects(CPU, "reference")]
    order = [(bench, subject.name) for bench, subject in table_module.ordered(benches, subjects, [])]
    assert len(order) == len(set(order)) == 3 * len(subjects)
    own = [subject.name for subject in subjects if not subject.kitchen]
    assert order[: len(own)] == [("main", name) for name in own]
    assert order[len(own)] == ("second", QANDC) and {bench for bench, _ in order[-2:]} == {"third"}
    packed = [order.index((bench, PACKED)) for bench in benches]
    assert min(packed) > max(order.index((bench, name)) for bench in benches for name in own)


def test_an_exception_of_a_part_loses_nothing(monkeypatch):
    def fails(*_):
        raise AssertionError("profiler")

    monkeypatch.setattr(table_module, "float_subjects", lambda device: float_subjects(device)[:1])
    monkeypatch.setattr(table_module, "integer_subjects", lambda *_: [])
    monkeypatch.setattr(table_module, "kernel_subjects", lambda *_: [])
    for part in ("extras", "products", "step_profiles"):
        monkeypatch.setattr(table_module, part, fails)
    monkeypatch.setattr(table_module, "measure_ceilings", lambda *_: Ceilings(1e11, None, 2e11, 4e11, 2e10, None))
    notes = []
    found = table_module.speed_table(CONFIG, [SETTING], CPU, 600.0, notes.append)
    assert len(found["rows"]) == 3 and "gemms: AssertionError: profiler" in notes
    assert "not measured" in markdown({**table([]), **found, "gemms": []})


def test_a_busy_moment_does_not_lower_a_ceiling():
    first, second = Ceilings(2.0, None, 3.0, 4.0, 5.0, 0.2), Ceilings(1.0, None, 6.0, None, 5.0, 0.1)
    assert best_of(first, second) == best_of(second, first) == Ceilings(2.0, None, 6.0, 4.0, 5.0, 0.1)


def test_differences_find_a_wrong_kernel():
    problem = gemms.Problem(34, 48, 64, CPU)
    right = gemms.differences(problem, reference, reference)
    assert set(right.values()) == {0.0}

    class Wrong:
        quantize_modulated, quantize_rows = reference.quantize_modulated, reference.quantize_rows

        @staticmethod
        def int8_matmul(codes, *rest, **options):
            return reference.int8_matmul(codes.roll(1, 0), *rest, **options)

    wrong = gemms.differences(problem, Wrong, reference)
    assert wrong["product"] > 0.5 and wrong["gated product"] > 0.1 and wrong["product to codes"] > 1
    assert wrong["codes"] == 0


def test_markdown_says_what_was_not_measured_and_what_failed():
    rows = [row("bf16 eager", memory=2 * 10**9, totals=[0.9, 1.1]), row("W4A8", problem="RuntimeError: no kernel")]
    text = markdown(table(rows))
    assert "| W4A8 | all steps | fails: RuntimeError: no kernel |" in text and "not measured" in text
    assert "| 4096 x 3456 x 1152 | 100 (75 %) | fails |" in text and "int_mm: RuntimeError: no" in text
    assert "0.900-1.100" in text and "2.00 |" in text
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1
    assert GPU_GOALS in markdown({**table(rows), "hardware": {"device": "cpu", "threads": 2, "cuda": False}})


def test_the_whole_table_of_a_tiny_model(monkeypatch):
    """Compiling is left out: it changes times alone."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)
    monkeypatch.setattr(table_module, "measure_ceilings", lambda *_: Ceilings(1e11, None, 2e11, 4e11, 2e10, None))
    saved = []
    settings = [SETTING, Setting(pixels=128, images=1, steps=6)]
    found = table_module.speed_table(
        CONFIG, settings, CPU, 600.0, print, lambda result: saved.append(len(result["rows"])), True
    )
    assert not [row for row in found["rows"] if row["problem"]]
    here = {(row["subject"], row["schedule"]): row for row in found["rows"] if row["setting"] == SETTING.label}
    names = {subject.name for subject in (*float_subjects(CPU), *integer_subjects(CPU, "reference"))}
    assert names <= {name for name, _ in here} and saved[-1] == len(found["rows"]) and saved == sorted(saved)
    base = min((row for row in here.values() if row["baseline"]), key=lambda row: row["total"])
    (fewer,) = (row for row in here.values() if "in the time" in row["schedule"])
    in_time = here[QANDC, "chosen steps"]["total"] / (base["total"] / base["steps"])
    assert fewer["steps"] == max(1, int(in_time)) and fewer["subject"] == base["subject"]
    full, fast = found["steps"]
    assert fast["step_gain"] == pytest.approx(full["computed"] / fast["computed"])
    assert all(0 < sum(step["groups"].values()) and step["words"] for step in (full, fast))
    assert set(found["floors"]) == {"64 px, batch 2", "128 px, batch 1"} and len(found["gemms"]) >= 4
    text = markdown({**table([]), **found})
    assert "## 128 px, batch 1" in text and QANDC in text


def test_the_command_writes_the_part_asked_for(tmp_path, monkeypatch, capsys):
    from benchmarks.speed import __main__ as command
    from benchmarks.speed import ratios, table

    sentences = ["A computed step takes 8 ms.", "A reused step takes 1 % of a computed one."]
    monkeypatch.setattr(ratios, "bench_import", lambda: {"seconds": 0.125})
    monkeypatch.setattr(table, "speed_table", lambda *_, **__: {"steps": [{"words": sentences}], "rows": []})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command.main(["--parts", "import", "speed", "--out", str(tmp_path / "out")])
    assert '"seconds": 0.125' in (tmp_path / "out" / "bench-cpu.json").read_text()
    out = capsys.readouterr().out
    assert "bench-cpu.json" in out and "\n".join(sentences) in out


def test_the_timing_of_the_papers_model_goes_on_where_it_stands(tmp_path, monkeypatch, capsys):
    from benchmarks.speed import paper_size

    monkeypatch.setattr(paper_size, "STEPS", 5)
    monkeypatch.setattr(paper_size, "preset", lambda name: preset(name, depth=1, hidden_size=64, num_heads=4))
    command = ["--model", "DiT-S/8", "--pixels", "64", "--out", str(tmp_path)]
    paper_size.main([*command, "--rounds", "1"])
    first = json.loads((tmp_path / "speed-dit-xl-cpu.json").read_text())["seconds"]
    paper_size.main([*command, "--rounds", "2"])
    found = json.loads((tmp_path / "speed-dit-xl-cpu.json").read_text())["seconds"]
    assert set(found) == {way.name for way in paper_size.WAYS} and all(len(values) == 2 for values in found.values())
    assert all(found[name][0] == values[0] > 0 for name, values in first.items())
    assert "2 interleaved round(s)" in (tmp_path / "speed-dit-xl-cpu.md").read_text()
    paper_size.main([*command, "--rounds", "3", "--seconds", "0"])
    assert "No time for another round; 2 of 3" in capsys.readouterr().err
    with pytest.raises(ValueError, match="choose another --out"):
        paper_size.main([*command, "--images", "2"])
    monkeypatch.setattr(paper_size, "WAYS", paper_size.WAYS[:-1])
    with pytest.raises(ValueError, match="has other rows; choose another --out"):
        paper_size.main([*command, "--rounds", "3"])
