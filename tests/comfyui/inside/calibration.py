"""TAP Calibrate on tiny models of ComfyUI's families and on the demo: what it keeps, resumes and holds out."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from families import build, empty_latent, inputs
from families import conditioning as family_conditioning
from family_list import FAMILIES
from host import Host, main, relative
from sampling import cache_policy, demo
from sampling import conditioning as class_labels

STEPS = 6
TENSORS = ("low", "high", "mean", "histogram", "hessian", "rows", "held_out")


@dataclass
class Case:
    """A model and what it is calibrated with; three runs of two, two and one image."""

    host: Host
    patcher: Any
    settings: Any
    latent: torch.Tensor

    def plan(self, **changes):
        small = {"trajectories": 5, "batch_size": 2, "samples": 12, "clusters": 4, "seed": 3, "tokens": 100}
        return self.host.module("nodes.comfyui.calibrate.run").Plan(**{**small, **changes})

    def calibrate(self, partial: Path | None = None, patcher=None, **plan):
        calibrate = self.host.module("nodes.comfyui.calibrate.run").calibrate
        return calibrate(patcher or self.patcher, self.settings, self.latent, self.plan(**plan), partial)

    def sample(self, watch, **plan) -> None:
        """The same sampling runs without calibration, `watch` around every model call."""
        watched = self.patcher.clone()
        watched.add_wrapper_with_key("apply_model", "watch", watch)
        for seed, size, first in self.plan(**plan).batches():
            self.host.module("nodes.comfyui.sampling").sample_new(
                watched, self.settings, self.latent[[0] * size], seed, lambda *_: None, first
            )

    def guided(self, cfg: float) -> Case:
        return replace(self, settings=replace(self.settings, cfg=cfg))


def family_case(host: Host, name: str) -> Case:
    family = FAMILIES[name]
    conditions = (family_conditioning(family, 1), family_conditioning(family, 2))
    settings = host.module("nodes.comfyui.sampling").Settings(*conditions, STEPS, 2.0, "euler", "simple")
    patcher, empty = build(family), {"samples": empty_latent(family)}
    return Case(host, patcher, settings, host.module("nodes.comfyui.calibrate.run").empty_latent(patcher, empty))


def demo_case(host: Host, tier: str = "attention and MLP") -> Case:
    """The built-in model with a cache, on four classes in turn."""
    patcher = host.module("nodes.comfyui.cache.attach").apply_cache(demo(host), cache_policy(host, 2, tier=tier))
    settings = host.module("nodes.comfyui.sampling").Settings(*class_labels(host), STEPS, 1.5, "ddpm", "normal")
    return Case(host, patcher, settings, torch.zeros(1, 3, 32, 32))


def interrupted(case: Case, partial: Path, call: int) -> int:
    """Cancels at the given prediction. Returns how many there were; the model must be left without hooks."""
    import comfy.model_management as mm

    patcher, calls = case.patcher.clone(), 0

    def predict_noise(executor, *args):
        nonlocal calls
        calls += 1
        if calls == call:
            mm.interrupt_current_processing()
        return executor(*args)

    patcher.add_wrapper_with_key("predict_noise", "interrupt", predict_noise)
    try:
        case.calibrate(partial, patcher)
        raise AssertionError("it was not interrupted")
    except mm.InterruptProcessingException:
        pass
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in case.patcher.model.modules())
    return calls


def differing(found, expected) -> list[str]:
    """What is not the same, bit for bit, in two calibrations."""
    wrong = [name for name in expected.statistics if name not in found.statistics]
    for name, layer in found.statistics.items():
        other = expected.statistics[name]
        same = (layer.count, layer.reach) == (other.count, other.reach)
        for key in TENSORS:
            ours, theirs = getattr(layer, key), getattr(other, key)
            same = same and (ours is theirs if ours is None or theirs is None else torch.equal(ours, theirs))
        wrong += [] if same else [name]
    wrong += [] if len(found.held_out) == len(expected.held_out) > 0 else ["held out"]
    for call, other in zip(found.held_out, expected.held_out):
        same = torch.equal(call.x, other.x) and torch.equal(call.sigma, other.sigma)
        wrong += [] if same and call.conditions.keys() == other.conditions.keys() else ["call"]
    return wrong


def resumes(case: Case, whole: int) -> dict[str, Any]:
    """Interrupted in the first pass, then in the first and in the last run of the second, then left to end; `whole` is
    the number of predictions of a pass.
    """
    partial = Path(case.host.base, "resumed.partial")
    partial.unlink(missing_ok=True)
    expected = case.calibrate()
    first = interrupted(case, partial, 4), partial.exists()
    second = interrupted(case, partial, whole + 3), partial.exists()
    third = interrupted(case, partial, whole - 1), partial.exists()
    calls = 0

    def count(executor, *args):
        nonlocal calls
        calls += 1
        return executor(*args)

    patcher = case.patcher.clone()
    patcher.add_wrapper_with_key("predict_noise", "count", count)
    found = case.calibrate(partial, patcher)
    return {"stops": [first, second, third], "left": calls, "differing": differing(found, expected)}


def row_set(rows: torch.Tensor) -> set[bytes]:
    return {row.view(torch.uint8).numpy().tobytes() for row in rows.contiguous()}


def rows_are_inputs(case: Case, telling: tuple[str, ...]) -> dict[str, Any]:
    """Kept rows against all inputs that plain hooks see. Inputs of the layers named `telling` differ for each image."""
    found = case.calibrate(tokens=100)
    seen: dict[str, set[bytes]] = {name: set() for name in found.statistics}
    last: dict[str, set[bytes]] = {name: set() for name in found.statistics}
    run = {"images": 0}

    def note(name: str, x: torch.Tensor) -> None:
        seen[name] |= row_set(x.reshape(-1, x.shape[-1]).bfloat16())
        if run["images"] == 1:  # the last run has one image
            last[name] |= row_set(x.reshape(-1, x.shape[-1]).bfloat16())

    def watch(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        run["images"] = len(x) // len(transformer_options["uuids"])
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    with ExitStack() as stack:
        for name in seen:
            module = case.patcher.model.diffusion_model.get_submodule(name)
            hook = module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
            stack.callback(hook.remove)
        case.sample(watch)
    layers = {name: layer for name, layer in found.statistics.items() if layer.rows is not None}
    apart = [name for name in layers if name.endswith(telling)]
    return {
        "layers": len(layers),
        "most": max(len(layer.rows) for layer in layers.values()),
        "full": sum(len(layer.rows) == 100 for layer in layers.values()),
        "held out": max(len(layer.held_out) for layer in layers.values()),
        "foreign": [n for n, layer in layers.items() if not row_set(layer.rows) <= seen[n]],
        "foreign, held out": [n for n, layer in layers.items() if not row_set(layer.held_out) <= last[n]],
        "told apart": len(apart),
        "mixed": [name for name in apart if row_set(layers[name].rows) & last[name]],
    }


def size_in_memory(calibration) -> int:
    gc.collect()
    tensors = [getattr(layer, key) for layer in calibration.statistics.values() for key in TENSORS]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


def memory(case: Case) -> dict[str, int]:
    """Statistics under a budget halfway between the least and what they would take."""
    layers = case.host.module("nodes.comfyui.quantize.layers").quantizable(case.patcher.model.diffusion_model)
    plan_statistics = case.host.module("qandc_core.calibration.memory").plan_statistics
    widths = [layer.in_features for _, layer in layers]
    least, most = (plan_statistics(widths, 2**40, tokens, 256).bytes for tokens in (64, 4096))
    budget = (least + most) // 2
    found = case.calibrate(tokens=4096, memory_gb=budget / 2**30)
    kept = [layer.hessian is not None for layer in found.statistics.values()]
    taken = {"least": least, "budget": budget, "taken": size_in_memory(found), "unbounded": most}
    return {**taken, "layers": len(kept), "of all": len(layers), "second moments": sum(kept)}


def too_little_memory(host: Host) -> str:
    try:
        family_case(host, "Flux").calibrate(memory_gb=1e-4)
    except ValueError as error:
        return str(error)
    return ""


def same_sample(call, x: torch.Tensor, given: dict[str, Any], row: int) -> bool:
    """Whether the call is this row of the batch, in its sample and in every tensor of its conditions."""
    of_row = {key: value[row : row + 1] for key, value in given.items() if isinstance(value, torch.Tensor)}
    return torch.equal(call.x, x[row : row + 1]) and all(
        torch.equal(call.conditions[key], value) for key, value in of_row.items() if len(given[key]) == len(x)
    )


def replays(case: Case, **plan) -> list[float]:
    """How far each held-out call, saved and loaded and called alone, is from what the model answered while sampling."""
    core, path = case.host.module("qandc_core"), Path(case.host.base, "replayed.safetensors")
    case.calibrate(**plan).save(path)
    calls, answers = core.load_calibration(path).held_out, {}

    def watch(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        out = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        given = {"c_concat": c_concat, "c_crossattn": c_crossattn, **kwargs}
        for number, call in enumerate(calls):
            for row in range(len(x)):
                if call.sigma[0] == t[row] and same_sample(call, x, given, row):
                    answers[number] = out[row : row + 1].clone()
        return out

    case.sample(watch, **plan)
    assert len(calls) == len(answers) > 0, (len(calls), len(answers))
    apply_model = case.patcher.model.apply_model
    return [relative(apply_model(c.x, c.sigma, **c.conditions), answers[i]) for i, c in enumerate(calls)]


def spread_of_held_out(case: Case) -> dict[str, Any]:
    """Noise levels of the held-out calls of four steps, each once; of both conditions alike."""
    calls = case.calibrate(held_out=4).held_out
    contexts = {call.conditions["c_crossattn"].sum().item() for call in calls}
    return {"calls": len(calls), "levels": len({float(call.sigma) for call in calls}), "conditions": len(contexts)}


def one_trajectory(case: Case) -> dict[str, int]:
    """Held-out calls are computed steps that were not chosen, where there are any."""
    some = case.calibrate(trajectories=1, samples=4)
    all_chosen = case.calibrate(trajectories=1, samples=100)
    none = case.calibrate(held_out=0)
    return {"some": len(some.held_out), "all chosen": len(all_chosen.held_out), "none": len(none.held_out)}


def with_a_control_net(host: Host) -> dict[str, int]:
    """What a ControlNet adds cannot be stored: layers have held-out inputs, and no call is kept."""
    name = "Flux with a ControlNet"
    case, (_, positive, negative, _) = family_case(host, name), inputs(FAMILIES[name])
    case.settings = replace(case.settings, positive=positive, negative=negative)
    found = case.calibrate(batch_size=1)
    return {"calls": len(found.held_out), "rows": min(len(layer.held_out) for layer in found.statistics.values())}


def experts(host: Host) -> dict[str, int]:
    """A network whose experts some calls give no tokens: those that got none are left out."""
    found = family_case(host, "HiDream-I1").calibrate()
    return {"layers": len(found.statistics), "without inputs": sum(s.count == 0 for s in found.statistics.values())}


def never_runs(host: Host) -> dict[str, Any]:
    """A layer that the network does not use gets no statistics, and the others do."""
    case = family_case(host, "Wan 2.1")
    blocks = case.patcher.model.diffusion_model.blocks
    blocks[0].unused = type(blocks[0].self_attn.q)(64, 64)
    found = case.calibrate()
    return {"unused": "blocks.0.unused" in found.statistics, "others": len(found.statistics)}


def digests(host: Host) -> dict[str, int]:
    """Names of partial files of equal inputs, built anew, and of such as differ in one thing each."""
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    digest_of = host.module("nodes.comfyui.calibrate.run").digest_of

    def digest(case: Case, **plan) -> str:
        return digest_of(case.patcher, case.settings, case.latent, case.plan(**plan))

    case, again = family_case(host, "Flux"), family_case(host, "Flux")
    (shifted,) = ModelSamplingFlux().patch(case.patcher, 2.0, 0.5, 64, 64)
    cached = host.module("nodes.comfyui.cache.attach").apply_cache(case.patcher, cache_policy(host, 2, tier="blocks"))
    prompt = replace(case.settings, positive=family_conditioning(FAMILIES["Flux"], 4))
    lora = case.patcher.clone()
    lora.add_patches({"diffusion_model.double_blocks.0.img_attn.proj.weight": ("diff", (torch.ones(64, 64),))}, 0.1)
    others = [replace(case, patcher=patcher) for patcher in (shifted, cached, lora)]
    others += [case.guided(3.0), replace(case, settings=prompt), replace(case, latent=torch.zeros(1, 16, 8, 16))]
    found = [digest(case), digest(case, tokens=99), *map(digest, others)]
    return {"same": len({digest(case), digest(again)}), "different": len(set(found)), "of": len(found)}


def through_the_node(host: Host) -> dict[str, Any]:
    """Cancelled once, then run again with the same inputs: files before and after."""
    import comfy.model_management as mm

    node, files = host.node("QandC_TAPCalibrate"), host.module("nodes.comfyui.files")
    case, wires = demo_case(host), dict(zip(("positive", "negative"), class_labels(host)))
    (wires["latent_image"],) = host.nodes.EmptyLatentImage().generate(32, 32, 1)
    given = ("new", 4, 8, STEPS, 1.5, "ddpm", "normal", 501, 2, "tap", 4, 5.0, True, True, "inside_tap")
    folder, before = files.calibration_folder(), files.calibration_files()
    interrupting, calls = case.patcher.clone(), 0

    def predict_noise(executor, *args):
        nonlocal calls
        calls += 1
        if calls == 3 * STEPS + 2:
            mm.interrupt_current_processing()
        return executor(*args)

    interrupting.add_wrapper_with_key("predict_noise", "interrupt", predict_noise)
    try:
        node.execute(interrupting, *given, **wires, memory_gb=1.0, tokens=128, held_out=2)
    except mm.InterruptProcessingException:
        pass
    kept, listed = len(list(folder.glob("inside_tap-*.partial"))), files.calibration_files() == before
    (found,) = node.execute(case.patcher, *given, **wires, memory_gb=1.0, tokens=128, held_out=2).args
    left, new = len(list(folder.glob("inside_tap-*"))), set(files.calibration_files()) - set(before)
    saved = host.module("qandc_core").load_calibration(folder / new.pop())
    return {
        "partial": kept, "not listed": listed, "left": left, "new": len(new) == 0, "saved": differing(saved, found),
        "notes": sorted(found.notes),
    }  # fmt: skip


if __name__ == "__main__":
    main({
        "resumes, DiT": lambda host: resumes(demo_case(host), 3 * STEPS),
        "resumes, Flux": lambda host: resumes(family_case(host, "Flux"), 3 * STEPS),
        "rows, Flux": lambda host: rows_are_inputs(family_case(host, "Flux"), ("img_attn.qkv", "linear1")),
        "rows, Wan": lambda host: rows_are_inputs(family_case(host, "Wan 2.1"), ("self_attn.q", "ffn.0")),
        "memory, Flux": lambda host: memory(family_case(host, "Flux")),
        "memory, Wan": lambda host: memory(family_case(host, "Wan 2.1")),
        "too little memory": too_little_memory,
        "replays, Flux": lambda host: replays(family_case(host, "Flux").guided(1.0), batch_size=1),
        "replays, Wan": lambda host: replays(family_case(host, "Wan 2.1").guided(1.0), batch_size=1),
        "replays in a batch, Flux": lambda host: replays(family_case(host, "Flux")),
        "replays in a batch, DiT": lambda host: replays(demo_case(host), trajectories=4),
        "replays in a batch, DiT, whole prediction": lambda host: replays(
            demo_case(host, "whole prediction"), trajectories=4
        ),
        "replays, sound and video": lambda host: replays(family_case(host, "LTX-AV").guided(1.0), batch_size=1),
        "ControlNet": with_a_control_net,
        "experts": experts,
        "spread": lambda host: spread_of_held_out(family_case(host, "Flux")),
        "one trajectory": lambda host: one_trajectory(family_case(host, "Flux")),
        "never runs": never_runs,
        "digests": digests,
        "node": through_the_node,
    })  # fmt: skip
