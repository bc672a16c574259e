"""Files: calibrations that are kept and shared, models that are saved and loaded again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .prompts import Graph
from .server import Server


def choices(server: Server, node: str, name: str) -> list[str]:
    kind, *options = server.object_info(node)[node]["input"]["required"][name]
    return kind if isinstance(kind, list) else options[0]["options"]


def calibrated(**inputs) -> tuple[Graph, str, str]:
    """Graph, its TAP Calibrate and its Save Latent."""
    graph = Graph()
    model = graph.cache(graph.load())
    calibration = graph.calibrate(model, **inputs)
    return graph, calibration[0], graph.picture(graph.quantize(model, calibration))


def compensated(**inputs) -> tuple[Graph, str, str]:
    """Graph, its Variance Compensate and its Save Latent."""
    graph = Graph()
    reference = graph.load()
    model = graph.compensate(graph.cache(reference), reference, **inputs)
    return graph, model[0], graph.picture(model)


CHAINS = pytest.mark.parametrize("chain", [calibrated, compensated])


def numbered(server, prefix: str) -> list[Path]:
    """The files of a prefix, by number: their names say the model and the date too."""
    return sorted(server.calibrations.glob(f"{prefix}_*_*-*-*_0000?.safetensors"))


@CHAINS
def test_a_file_is_kept_listed_and_used_again_without_sampling(server, chain):
    graph, node, picture = chain(filename_prefix=f"kept_{chain.__name__}")
    made = server.succeed(graph)
    assert made.progress[node]
    ((name, path),) = ((path.name, path) for path in numbered(server, f"kept_{chain.__name__}"))
    assert re.fullmatch(rf"kept_{chain.__name__}_demo_\d{{4}}-\d\d-\d\d_00001\.safetensors", name) and path.is_file()
    assert not list(server.calibrations.glob("*.tmp"))
    for listing, own in (("QandC_TAPCalibrate", calibrated), ("QandC_VarianceCompensate", compensated)):
        assert (name in choices(server, listing, "file")) is (chain is own)
    picked, node, same = chain(file=name, wired=False)
    used = server.succeed(picked)
    assert node in used.executed and not used.progress[node]
    assert server.saved(used, same) == server.saved(made, picture)


@CHAINS
def test_the_same_inputs_give_the_same_file_and_others_a_number_of_their_own(server, chain):
    """Run again after everything was forgotten: the image is the same to the bit, and the file is not made anew."""
    prefix = f"numbered_{chain.__name__}"
    graph, node, picture = chain(filename_prefix=prefix)
    made = server.succeed(graph)
    (made_first,) = numbered(server, prefix)
    first = made_first.read_bytes()
    server.free_memory()
    again = server.succeed(graph)
    assert node in again.executed and not again.progress[node]
    assert server.saved(again, picture) == server.saved(made, picture)
    assert numbered(server, prefix) == [made_first]
    other, _, _ = chain(filename_prefix=prefix, calibration_seed=77)
    server.succeed(other)
    assert len(numbered(server, prefix)) == 2 and made_first.read_bytes() == first


@CHAINS
def test_a_prefix_cannot_leave_the_folder(server, chain):
    graph, _, _ = chain(filename_prefix=f"../../out of {chain.__name__}")
    server.succeed(graph)
    assert not list(server.base.rglob("out of *"))
    assert list(server.calibrations.glob(f"*out_of_{chain.__name__}_*_00001.safetensors"))


@CHAINS
def test_an_absent_file_is_made_where_it_is_wired(server, chain):
    name = f"of a friend ({chain.__name__}).safetensors"
    graph, node, picture = chain(file=name)
    made = server.succeed(graph)
    assert made.progress[node] and (server.calibrations / name).is_file()
    picked, node, same = chain(file=name, wired=False)
    used = server.succeed(picked)
    assert not used.progress[node]
    assert server.saved(used, same) == server.saved(made, picture)


@CHAINS
def test_a_file_that_changes_is_read_again(server, chain):
    name = f"changing_{chain.__name__}.safetensors"
    graph, _, _ = chain(file=name)
    server.succeed(graph)
    picked, node, _ = chain(file=name, wired=False)
    server.succeed(picked)
    assert node in server.succeed(picked).cached
    (server.calibrations / name).write_bytes(b"damaged")
    run = server.run(picked)
    assert run.error["node_id"] == node and name in run.message


def quantized(graph: Graph, **inputs):
    model = graph.load()
    calibration = graph.calibrate(model, hessians=True, filename_prefix="to_save")
    return graph.quantize(model, calibration, **inputs)


# How to make each kind of model, and the ComfyUI that it needs.
MODELS = {
    "full precision": (lambda graph: graph.load(), (0, 3)),
    "dynamic W8A8": (lambda graph: graph.quantize(graph.load()), (0, 3)),
    "static W8A8": (quantized, (0, 3)),
    "gptq W4A8": (lambda graph: quantized(graph, format="W4A8", rounding="gptq"), (0, 3)),
    "native W8A8": (lambda graph: quantized(graph, method="native"), (0, 27)),
    "native W4A8": (lambda graph: quantized(graph, format="W4A8", method="native"), (0, 31)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_gives_the_same_picture(server, kind):
    make, version = MODELS[kind]
    if server.checkout.version < version:
        pytest.skip(f"this ComfyUI is older than {'.'.join(map(str, version))}, which has the format")
    prefix = kind.replace(" ", "_")
    graph = Graph()
    model = make(graph)
    picture = graph.picture(model)
    graph.save_model(model, prefix)
    expected = server.saved(server.succeed(graph), picture)
    name = f"{prefix}_00001_.safetensors"
    assert name in choices(server, "QandC_LoadDiT", "model_name")
    loaded = Graph()
    again = loaded.picture(loaded.load(name))
    assert server.saved(server.succeed(loaded), again) == expected


def test_quantized_files_are_smaller(server):
    graph = Graph()
    model = graph.load()
    for name, saved in {"small_w8": graph.quantize(model), "full": model}.items():
        graph.save_model(saved, name)
    server.succeed(graph)
    folder = server.base / "output" / "diffusion_models"
    assert (folder / "small_w8_00001_.safetensors").stat().st_size < 0.6 * (
        folder / "full_00001_.safetensors"
    ).stat().st_size


def test_a_model_file_that_changes_is_loaded_again(server, tiny_dit):
    (server.models / "swapped.safetensors").write_bytes((server.models / tiny_dit).read_bytes())
    graph = Graph()
    model = graph.load("swapped.safetensors")
    graph.picture(model)
    server.succeed(graph)
    assert model[0] in server.succeed(graph).cached
    (server.models / "swapped.safetensors").write_bytes(b"damaged")
    assert server.run(graph).error["node_id"] == model[0]
