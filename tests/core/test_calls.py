import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qandc_core.calibration.calls import ModelCall, pack_calls, storable, unpack_calls
from qandc_core.calibration.file import Calibration, load_calibration
from qandc_core.calibration.statistics import LayerStatistics


def same(one, other):
    if isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(other, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def same_calls(one, other):
    return len(one) == len(other) and all(
        same(a.x, b.x)
        and same(a.sigma, b.sigma)
        and list(a.conditions) == list(b.conditions)
        and same(list(a.conditions.values()), list(b.conditions.values()))
        for a, b in zip(one, other)
    )


def calls():
    prompt = torch.randn(2, 7, 5)
    conditions = {
        "c_crossattn": prompt[:1], "guidance": 3.5, "frames": 3, "flag": True, "kind": "i2v", "nothing": None,
        "references": [torch.randn(1, 4), (torch.arange(3), [1, 2.5, "x"], ())], "empty": torch.empty(0, 4),
        "half": torch.randn(3).bfloat16(), "transposed": torch.randn(3, 2).T,
    }  # fmt: skip
    first = ModelCall(torch.randn(1, 4, 8, 8), torch.tensor([0.3]), conditions)
    return first, ModelCall(torch.randn(1, 4), torch.ones(1, dtype=torch.float64), {"c_crossattn": prompt[1:]})


def test_calls_survive_a_file(tmp_path):
    made = calls()
    tensors, structure = pack_calls(made)
    assert all(name.startswith(f"held_out/{call}/") for call in (0, 1) for name in tensors if f"/{call}/" in name)
    save_file(tensors, tmp_path / "calls")
    assert same_calls(unpack_calls(load_file(tmp_path / "calls"), json.loads(json.dumps(structure))), made)
    assert pack_calls(()) == ({}, []) and unpack_calls({}, []) == ()


def test_what_can_be_stored():
    assert all(storable(value) for call in calls() for value in call.conditions.values())
    for value in (object(), {"a": 1}, [1, {2}], torch.Size([1]), torch.float32, lambda: 0, (1, [torch]), 1j):
        assert not storable(value)
        with pytest.raises(ValueError, match="^The condition extra is a .*, which no file can hold; skip it"):
            pack_calls([ModelCall(torch.zeros(1), torch.ones(1), {"extra": value})])


def statistics():
    kept = LayerStatistics.empty(6, inputs=4, held_out=8)
    kept.update(torch.randn(9, 6))
    kept.keep_inputs(torch.randn(3, 6))
    kept.keep_held_out(torch.randn(5, 6))
    return kept


def test_a_calibration_file_holds_calls_rows_and_held_out_inputs(tmp_path):
    made = Calibration("abc", {"fc": statistics(), "plain": LayerStatistics.empty(3)}, held_out=calls())
    made.save(tmp_path / "file")
    read = load_calibration(tmp_path / "file")
    assert same_calls(read.held_out, made.held_out)
    assert same(read.statistics["fc"].inputs, made.statistics["fc"].inputs)
    assert same(read.statistics["fc"].held_out, made.statistics["fc"].held_out)
    assert read.statistics["plain"].inputs is None and read.statistics["plain"].held_out is None
    assert same_calls(replace(read, schedule=(0,)).held_out, made.held_out)


def test_a_file_of_before_has_no_calls(tmp_path):
    made = Calibration("abc", {"fc": statistics()}, notes={"seed": 1})
    made.save(tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as file:
        header = json.loads(file.metadata()["qandc"])
    del header["held_out"]
    save_file(load_file(tmp_path / "file"), tmp_path / "old", {"qandc": json.dumps(header)})
    assert load_calibration(tmp_path / "old").held_out == ()


def test_a_damaged_file_says_so(tmp_path):
    Calibration("abc", held_out=calls()).save(tmp_path / "file")
    tensors = load_file(tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as file:
        metadata = file.metadata()
    del tensors["held_out/0/1"]
    save_file(tensors, tmp_path / "damaged", metadata)
    with pytest.raises(ValueError, match="is damaged, it lacks 'held_out/0/1'; calibrate again"):
        load_calibration(tmp_path / "damaged")
