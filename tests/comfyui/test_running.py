"""Runs: the whole chain, progress, cancelling, and that equal graphs give equal images."""

from __future__ import annotations

import pytest

from .prompts import DEMO, Graph, renewed
from .server import Server

LONG = {"trajectories": 2048, "batch_size": 256, "steps": 50}  # hundreds of slow steps


def whole_chain() -> tuple[Graph, dict[str, str]]:
    """Full precision beside cached, calibrated, quantized and compensated; and the ids of its nodes."""
    graph = Graph()
    reference = graph.load()
    cached = graph.cache(reference)
    calibration = graph.calibrate(cached)
    quantized = graph.quantize(cached, calibration)
    compensated = graph.compensate(quantized, reference)
    runs = graph.sample(reference, label="reference"), graph.sample(compensated)
    comparison = graph.compare(*runs)
    for run in runs:
        graph.save(run)
    names = {
        "calibrate": calibration[0],
        "quantize": quantized[0],
        "compensate": compensated[0],
        "sample": runs[1][0],
        "compare": comparison[0],
    }
    return graph, names


@pytest.fixture(scope="module")
def chain(server: Server):
    graph, names = whole_chain()
    prompt = renewed(graph)
    return prompt, names, server.succeed(prompt)


def latents(server: Server, run, prompt: dict) -> list[bytes]:
    """What every Save Latent of the prompt wrote."""
    return [server.saved(run, name)[0] for name, node in sorted(prompt.items()) if node["class_type"] == "SaveLatent"]


def test_every_node_of_the_chain_runs(chain):
    prompt, _, run = chain
    assert run.executed | set(run.cached) == set(prompt)


@pytest.mark.parametrize("name", ["calibrate", "quantize", "compensate", "sample"])
def test_long_nodes_show_progress_and_previews(chain, name):
    _, names, run = chain
    steps = run.progress[names[name]]
    values = [value for value, _ in steps]
    assert values == sorted(values) and len({total for _, total in steps}) == 1
    assert values[-1] == steps[-1][1], "the bar does not reach its end"
    assert run.previews[names[name]] > 0


def test_compare_shows_a_picture_and_a_table(server, chain):
    _, names, run = chain
    shown = run.outputs[names["compare"]]
    table = shown["text"][0]
    assert "reference" in table and "W8A8" in table and "2 of 4" in table
    picture = shown["images"][0]
    path = f"/view?filename={picture['filename']}&subfolder={picture['subfolder']}&type={picture['type']}"
    assert server.get(path).startswith(b"\x89PNG")


def table_of(run, comparison) -> list[str]:
    """The lines of Compare's table, without the headlines before it."""
    return [line for line in run.outputs[comparison[0]]["text"][0].splitlines() if line.startswith("|")]


def test_compare_needs_no_reports(server):
    graph = Graph()
    image = graph.decode(graph.sample(graph.load()))
    images = {"images.image0": image, "images.image1": image, "images.image2": image}
    comparison = graph.add("QandC_Compare", **images, shown=2, difference_gain=4.0)
    table = table_of(server.succeed(graph), comparison)
    assert len(table) == 2 + 3 and sum("equal" in line for line in table) == 2


def test_compare_tells_runs_that_are_not_the_same(server):
    graph = Graph()
    model = graph.load()
    one = graph.add("EmptyLatentImage", width=32, height=32, batch_size=1)
    runs = graph.sample(model), graph.sample(model, latent_image=one, seed=8, steps=3)
    comparison = graph.compare(*runs)
    table = server.succeed(graph).outputs[comparison[0]]["text"][0]
    first, _, second = table.splitlines()[:3]
    assert first.startswith("**Not the same run: seed ") and ", 8; steps 4, 3" in first
    assert "32x32, 1 x 32x32" in second


def test_compare_takes_grey_and_transparent_images_and_shows_progress(server):
    graph = Graph()
    grey = graph.add("MaskToImage", mask=graph.add("SolidMask", value=0.5, width=64, height=64))
    mask = graph.add("SolidMask", value=0.25, width=64, height=64)
    clear = graph.add("JoinImageWithAlpha", image=grey, alpha=mask)
    images = {"images.image0": grey, "images.image1": clear, "images.image2": grey}
    comparison = graph.add("QandC_Compare", **images, shown=2, difference_gain=4.0)
    run = server.succeed(graph)
    table = table_of(run, comparison)
    assert len(table) == 2 + 3 and sum("equal" in line for line in table) == 1
    assert run.progress[comparison[0]][-1] == (2, 2)


def test_compare_can_be_cancelled(server):
    graph = Graph()
    size = {"width": 768, "height": 768, "batch_size": 24}
    images = {f"images.image{i}": graph.add("EmptyImage", color=1000 * i, **size) for i in range(2)}
    comparison = graph.add("QandC_Compare", **images, shown=2, difference_gain=4.0)
    running = server.start(graph)
    running.wait_for_progress(comparison[0])
    running.interrupt(comparison[0])
    run = running.finish()
    last, total = run.progress[comparison[0]][-1]
    assert run.status == "interrupted" and last < total


def test_quantize_says_what_it_did(chain):
    _, names, run = chain
    assert "layers in W8A8" in run.outputs[names["quantize"]]["text"][0]


def test_native_quantization_is_measured_and_compared(server):
    if server.checkout.version < (0, 27):
        pytest.skip("this ComfyUI is older than 0.27, which has W8A8")
    graph = Graph()
    model = graph.load()
    cached = graph.cache(model)
    quantized = graph.quantize(cached, graph.calibrate(cached, hessians=True), method="native")
    comparison = graph.compare(graph.sample(model), graph.sample(quantized))
    run = server.succeed(graph)
    said = run.outputs[quantized[0]]["text"][0]
    assert "layers W8A8" in said and "held-out samples" in said and "worst layer blocks." in said
    assert said.partition(";")[0] in run.outputs[comparison[0]]["text"][0]


def test_acceleration_changes_the_picture_a_little(server, chain):
    prompt, _, run = chain
    reference, accelerated = latents(server, run, prompt)
    assert reference != accelerated


def test_the_same_prompt_again_comes_from_the_cache(server):
    prompt = renewed(whole_chain()[0])
    first = server.succeed(prompt)
    again = server.succeed(prompt)
    assert set(again.cached) == set(prompt) and not again.executed
    assert latents(server, again, prompt) == latents(server, first, prompt)


def test_running_again_gives_the_same_pictures(server, chain):
    prompt, _, run = chain
    again = renewed(prompt)
    rerun = server.succeed(again)
    assert {name for name, node in again.items() if node["class_type"] == "SaveLatent"} <= rerun.executed
    assert latents(server, rerun, again) == latents(server, run, prompt)


def test_freed_memory_gives_the_same_pictures(server, chain):
    prompt, _, run = chain
    server.free_memory()
    rerun = server.succeed(prompt)
    assert rerun.cached == []
    assert latents(server, rerun, prompt) == latents(server, run, prompt)


def test_the_loaded_model_stays_as_it_was(server):
    """Its picture after everything was made of it is its picture before."""
    alone = Graph()
    picture = alone.picture(alone.load())
    expected = server.saved(server.succeed(alone), picture)
    graph = Graph()
    reference = graph.load()
    cached = graph.cache(reference)
    quantized = graph.quantize(cached, graph.calibrate(cached))
    accelerated = graph.picture(graph.compensate(quantized, reference))
    server.succeed(graph)
    after = graph.picture(reference)
    run = server.succeed(graph)
    assert run.executed >= {after} and accelerated in run.cached
    assert server.saved(run, after) == expected


@pytest.mark.parametrize("inputs", [{}, {"sampler_name": "euler"}, {"cfg": 1.0}, {"denoise": 0.5}], ids=str)
def test_sample_gives_what_ksampler_gives(server, inputs):
    graph = Graph()
    model = graph.cache(graph.load())
    ours, stock = graph.picture(model, **inputs), graph.save(graph.stock_sample(model, **inputs))
    run = server.succeed(graph)
    assert server.saved(run, ours) == server.saved(run, stock)


def test_interval_one_and_all_steps_chosen_change_no_bit(server):
    graph = Graph()
    model = graph.load()
    off = graph.cache(graph.cache(model, interval=3), interval=1)
    every = graph.add(
        "QandC_ApplyCache", model=model, policy="chosen steps", order=1, **{"policy.computed_steps": "0-3"}
    )
    plain, *equal = [graph.picture(m) for m in (model, off, every)]
    other = graph.picture(graph.cache(model, interval=3))
    run = server.succeed(graph)
    assert all(server.saved(run, name) == server.saved(run, plain) for name in equal)
    assert server.saved(run, other) != server.saved(run, plain)


def cancelled_prompt(name: str) -> tuple[Graph, str]:
    """A run of one node, of minutes."""
    graph = Graph(batch_size=256)
    model = graph.cache(graph.load())
    if name == "calibrate":
        node = graph.calibrate(model, **LONG)
        graph.picture(graph.quantize(model, node))
    elif name == "compensate":
        node = graph.compensate(model, model, pairs=256, steps=500)
        graph.picture(node)
    else:
        node = graph.sample(model, steps=500)
        graph.save(node)
    return graph, node[0]


@pytest.mark.parametrize("name", ["calibrate", "compensate", "sample"])
def test_cancelling_stops_within_a_few_steps_and_leaves_nothing_behind(server, chain, name):
    prompt, _, before = chain
    files = set(server.calibrations.iterdir())
    cancelled, node = cancelled_prompt(name)
    running = server.start(cancelled)
    running.wait_for_progress(node)
    reached = running.interrupt(node)
    run = running.finish()
    assert run.status == "interrupted"
    last, total = run.progress[node][-1]
    assert last <= reached + 5 < total
    assert set(server.calibrations.iterdir()) == files
    assert_same_again(server, prompt, before)


def test_an_error_leaves_nothing_behind(server, chain):
    prompt, _, before = chain
    graph = Graph()
    graph.picture(graph.compensate(graph.cache(graph.load()), graph.load()), steps=5)
    assert server.run(graph).status == "error"
    assert_same_again(server, prompt, before)


def assert_same_again(server: Server, prompt: dict, before) -> None:
    """The model in ComfyUI's memory, the one the failed run had, gives the pictures it gave before."""
    again = renewed(prompt)
    run = server.succeed(again)
    assert next(name for name, node in again.items() if node["class_type"] == "QandC_LoadDiT") in run.cached
    assert latents(server, run, again) == latents(server, before, prompt)


def test_the_demo_needs_no_files(server):
    choices = server.object_info("QandC_LoadDiT")["QandC_LoadDiT"]["input"]["required"]["model_name"]
    options = choices[0] if isinstance(choices[0], list) else choices[1]["options"]
    assert options[0] == DEMO
