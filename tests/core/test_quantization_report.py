import math
from dataclasses import replace

from qandc_core.quantization.report import LayerReport, QuantizationReport

MIB = 2**20
LAYERS = [
    LayerReport("blocks.0.attn.qkv", "W4A8", 0.03, 600 * MIB, 170 * MIB),
    LayerReport("blocks.0.mlp.fc2", "W4A8", 0.061, 600 * MIB, 170 * MIB),
    LayerReport("blocks.1.attn.qkv", "W8A8", 0.008, 100 * MIB, 51 * MIB),
    LayerReport("head", "float", 0.0, 4 * MIB, 4 * MIB),
]


def report(layers=LAYERS, error=(0.0213, 0.0018, 8)):
    return QuantizationReport("W4A8", list(layers), 411.7, "cuda", error)


def test_numbers():
    made = report()
    assert (made.size_before, made.size_after) == (1304 * MIB, 395 * MIB)
    assert made.counts == {"W4A8": 2, "W8A8": 1, "float": 1}
    assert made.worst.name == "blocks.0.mlp.fc2"


def test_summary_is_one_line():
    assert report().summary() == (
        "2 layers W4A8, 1 W8A8, 1 float; 1.3 -> 0.4 GiB; error of the whole model 0.021 +- 0.002 on 8 held-out "
        "samples; worst layer blocks.0.mlp.fc2 0.061; 412 s; multiplied by cuda"
    )
    assert report(LAYERS[2:3], (0.5, math.nan, 1)).summary() == (
        "1 layer W8A8; 100.0 -> 51.0 MiB; error of the whole model 0.5 on 1 held-out sample; "
        "worst layer blocks.1.attn.qkv 0.008; 412 s; multiplied by cuda"
    )
    assert "whole model" not in report(error=None).summary()


def test_table_lists_the_worst():
    lines = report().table(2).splitlines()
    assert lines[0].startswith("| layer |") and len(lines) == 4
    assert lines[2] == "| blocks.0.mlp.fc2 | W4A8 | 0.061 | 600.00 | 170.00 |"
    assert lines[3].startswith("| blocks.0.attn.qkv | W4A8 | 0.03 |")
    assert len(report().table().splitlines()) == 6


def test_a_source_that_was_packed_before_is_stated():
    made = replace(report(), sources={"W8A8": 3, "float8_e4m3fn": 1})
    words = "from layers in 3 W8A8, 1 float8_e4m3fn, which errors are against: what those lost before comes on top"
    assert words in made.summary().split("; ") and made.headline().endswith(f"\n{words}")


def test_a_limit_that_was_missed_is_said():
    assert report().misses(None) == report().misses(0.02) == report(error=None).misses(0.001) == []
    (said,) = report().misses(0.01)
    assert said.startswith("the model's error is 0.021, above max_model_error = 0.01; ")


def test_headline_answers_what_is_asked_first():
    assert report().headline() == (
        "1.3 -> 0.4 GiB, 2.1 % error of the model\n2 W4A8, 1 W8A8, 1 float layers\n"
        "Worst layer blocks.0.mlp.fc2, 6.1 %\nKernels: cuda"
    )
    assert report(error=None).headline().startswith("1.3 -> 0.4 GiB, 2.5 % error of a layer on average\n")
