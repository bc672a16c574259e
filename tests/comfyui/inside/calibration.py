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
from family_list import FAMILIES, WIDTH
from host import Host, main, relative
from sampling import cache_policy, demo
from sampling import conditioning as class_labels

STEPS = 6
FEW = 4  # samples, fewer than half of the candidates, so that there is a second pass
TENSORS = ("low", "high", "mean", "histogram", "hessian", "inputs", "held_out")


@dataclass
class Case:
    """A model and what it is calibrated with; three runs of two, two and one image."""

    host: Host
    patcher: Any
    settings: Any
    latent: dict[str, Any]

    def plan(self, **changes):
        small = {"trajectories": 5, "batch_size": 2, "samples": 12, "clusters": 4, "seed": 3, "tokens": 100}
        return self.host.module("nodes.comfyui.calibrate.run").CalibrationConfig(**{**small, **changes})

    def calibrate(self, partial: Path | None = None, patcher=None, **plan):
        calibrate = self.host.module("nodes.comfyui.calibrate.run").calibrate
        return calibrate(patcher or self.patcher, self.settings, self.latent, self.plan(**plan), partial)

    def sample(self, watch, **plan) -> None:
        """The same sampling runs without calibration, `watch` around every model call."""
        watched = self.patcher.clone()
        watched.add_wrapper_with_key("apply_model", "watch", watch)
        for batch in self.plan(**plan).batches():
            images = self.host.module("nodes.comfyui.settings").images_of(self.latent, range(batch.size))
            self.host.module("nodes.comfyui.sampling").sample_new(
                watched, self.settings, images, batch.seed, lambda *_: None, batch.first, batch.prompt
            )

    def guided(self, cfg: float) -> Case:
        return replace(self, settings=replace(self.settings, cfg=cfg))


def family_case(host: Host, name: str) -> Case:
    family = FAMILIES[name]
    conditions = (family_conditioning(family, 1), family_conditioning(family, 2))
    settings = host.module("nodes.comfyui.sampling").Settings(*conditions, STEPS, 2.0, "euler", "simple")
    patcher, empty = build(family), {"samples": empty_latent(family)}
    return Case(host, patcher, settings, host.module("nodes.comfyui.sampling").prepared(patcher, empty))


def demo_case(host: Host, reuse: str = "attention and MLP") -> Case:
    """The built-in model with a cache, on four classes in turn."""
    patcher = host.module("nodes.comfyui.cache.attach").apply_cache(demo(host), cache_policy(host, 2, reuse=reuse))
    settings = host.module("nodes.comfyui.sampling").Settings(*class_labels(host), STEPS, 1.5, "ddpm", "normal")
    return Case(host, patcher, settings, {"samples": torch.zeros(1, 3, 32, 32)})


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
        case.calibrate(partial, patcher, samples=FEW)
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
    expected = case.calibrate(samples=FEW)
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
    found = case.calibrate(partial, patcher, samples=FEW)
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
    layers = {name: layer for name, layer in found.statistics.items() if layer.inputs is not None}
    apart = [name for name in layers if name.endswith(telling)]
    return {
        "layers": len(layers),
        "most": max(len(layer.inputs) for layer in layers.values()),
        "full": sum(len(layer.inputs) == 100 for layer in layers.values()),
        "held out": max(len(layer.held_out) for layer in layers.values()),
        "foreign": [n for n, layer in layers.items() if not row_set(layer.inputs) <= seen[n]],
        "foreign, held out": [n for n, layer in layers.items() if not row_set(layer.held_out) <= last[n]],
        "told apart": len(apart),
        "mixed": [name for name in apart if row_set(layers[name].inputs) & last[name]],
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


def controlled(strength: float, hint: float = 1.0, weight: float = 1.0, start: float = 0.0):
    """Settings' conditions of Flux with a ControlNet whose weights, strength, range and image are given."""
    import comfy.controlnet

    from nodes import ControlNetApplyAdvanced

    class Net(comfy.controlnet.ControlBase):
        def __init__(self):
            super().__init__()
            self.control_model = torch.nn.Linear(4, WIDTH)
            torch.nn.init.constant_(self.control_model.weight, weight)
            torch.nn.init.zeros_(self.control_model.bias)

        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            self.cond_hint = self.cond_hint_original.to(x_noisy)  # as core's do, until the run is over
            features = self.control_model(self.cond_hint.mean((1, 2))[:, :4])
            return self.control_merge({"input": [features[:, None].repeat(1, 16, 1)], "output": []}, None, None)

        def copy(self):
            made = Net()
            made.control_model = self.control_model
            self.copy_to(made)
            return made

    positive, negative = (family_conditioning(FAMILIES["Flux"], seed) for seed in (1, 2))
    image = torch.full((1, 64, 64, 3), hint)
    return ControlNetApplyAdvanced().apply_controlnet(positive, negative, Net(), image, strength, start, 1.0)


def hooked(strength: float, weight: float = 1.0):
    """A prompt with a LoRA hooked to it, of this strength, for a part of the run."""
    import comfy.hooks

    key = "diffusion_model.double_blocks.0.img_attn.proj.weight"
    hook = comfy.hooks.WeightHook(strength, 0.0)
    hook.weights, hook.need_weight_init = {key: ("diff", (torch.full((WIDTH, WIDTH), weight),))}, False
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return comfy.hooks.set_hooks_for_conditioning(family_conditioning(FAMILIES["Flux"], 1), group)


class Scaling:
    """A patch of another pack."""

    def __init__(self, scale: float):
        self.scale = scale

    def __call__(self, x, *args):
        return x * self.scale

    def wrapper(self, executor, *args, **kwargs):
        return executor(*args, **kwargs) * self.scale


def patched(patcher, scale: float, how: str):
    made = patcher.clone()
    if how == "options":
        made.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * scale)
    elif how == "patch":
        made.set_model_attn1_patch(Scaling(scale))
    elif how == "wrapper":
        made.add_wrapper_with_key("apply_model", "other", Scaling(scale).wrapper)
    elif how == "object":
        made.add_object_patch("diffusion_model.other_pack", Scaling(scale))
    return made


def digests(host: Host) -> dict[str, Any]:
    """Digests of equal inputs, built anew, and of such as differ in one thing each."""
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    digest_of = host.module("nodes.comfyui.calibrate.run").digest_of

    def digest(case: Case, **plan) -> str:
        found = digest_of(case.patcher, case.settings, case.latent, case.plan(**plan))
        assert found.known, found.opaque
        return found.hex

    case = family_case(host, "Flux")

    def prompted(positive, negative=None) -> Case:
        settings = replace(case.settings, positive=positive, negative=negative or case.settings.negative)
        return replace(case, settings=settings)

    def on(patcher) -> Case:
        return replace(case, patcher=patcher)

    def attached(how: str):
        return lambda scale: on(patched(case.patcher, scale, how))

    def lora(strength: float) -> Case:
        patcher = case.patcher.clone()
        key = "diffusion_model.double_blocks.0.img_attn.proj.weight"
        patcher.add_patches({key: ("diff", (torch.ones(64, 64),))}, strength)
        return on(patcher)

    def cached(interval: int) -> Case:
        return on(host.module("nodes.comfyui.cache.attach").apply_cache(
            case.patcher, cache_policy(host, interval, reuse="blocks")
        ))  # fmt: skip

    variants = {
        "plain": [lambda: case, lambda: family_case(host, "Flux")],
        "shift": [lambda s=s: on(ModelSamplingFlux().patch(case.patcher, s, 0.5, 64, 64)[0]) for s in (2.0, 2.1)],
        "cache": [lambda n=n: cached(n) for n in (2, 3)],
        "lora": [lambda s=s: lora(s) for s in (0.1, 0.2)],
        "guidance": [lambda c=c: case.guided(c) for c in (3.0, 4.0)],
        "prompt": [lambda n=n: prompted(family_conditioning(FAMILIES["Flux"], n)) for n in (4, 5)],
        "size": [lambda n=n: replace(case, latent={"samples": torch.zeros(1, 16, 8, n)}) for n in (12, 16)],
        "control strength": [lambda s=s: prompted(*controlled(s)) for s in (1.0, 0.02)],
        "control image": [lambda h=h: prompted(*controlled(0.5, h)) for h in (0.1, 0.2)],
        "control weights": [lambda w=w: prompted(*controlled(0.5, 1.0, w)) for w in (2.0, 3.0)],
        "control range": [lambda s=s: prompted(*controlled(0.5, start=s)) for s in (0.1, 0.2)],
        "hook strength": [lambda s=s: prompted(hooked(s)) for s in (0.1, 0.2)],
        "hook weights": [lambda w=w: prompted(hooked(0.5, w)) for w in (0.1, 0.2)],
        **{
            f"{how} of another pack": [lambda s=s, how=how: attached(how)(s) for s in (0.5, 0.6)]
            for how in ("options", "patch", "wrapper", "object")
        },
    }
    found = {f"{name} {n}": digest(make()) for name, makes in variants.items() for n, make in enumerate(makes)}
    unequal = [n for n, makes in variants.items() if n != "plain" and digest(makes[0]()) != found[f"{n} 0"]]
    assert found.pop("plain 1") == found["plain 0"]
    for name in ("control strength", "hook strength", "cache", "shift", "wrapper of another pack"):
        used = variants[name][0]()
        before = digest(used)
        used.sample(lambda executor, *args, **kwargs: executor(*args, **kwargs), trajectories=1)
        unequal += [] if digest(used) == before else [f"{name}, after sampling"]
    opaque = case.patcher.clone()
    opaque.model_options["transformer_options"]["other"] = iter(())
    unknown = digest_of(opaque, case.settings, case.latent, case.plan())
    return {
        "unequal": unequal, "different": len({digest(case, tokens=99), *found.values()}), "of": len(found) + 1,
        "opaque": unknown.known,
    }  # fmt: skip


def resumes_with_other_controls(host: Host) -> dict[str, Any]:
    """Through the node: cancelled with one strength of a ControlNet, then run with another."""
    case = family_case(host, "Flux")
    empty = {"samples": empty_latent(FAMILIES["Flux"])}
    node, files = host.node("QandC_TAPCalibrate"), host.module("nodes.comfyui.files")

    def tap(prefix: str, strength: float):
        positive, negative = controlled(strength)
        return node.execute(
            case.patcher, "new", 4, 3, 2, 2.0, "euler", "simple", 1, 1, "random", 3, 5.0, True, True, prefix,
            positive, negative, empty, held_out=0,
        ).args[0]  # fmt: skip

    expected = tap("control", 0.02)
    cancel(host, 4 * 2 + 3, lambda: tap("resumed", 1.0))
    found = tap("resumed", 0.02)
    return {
        "differing": [n for n in differing(found, expected) if n != "held out"],
        "partial": len(list(files.calibration_folder().glob("resumed-*.partial"))),
        "strength matters": len(differing(tap("other", 1.0), expected)) > 1,
    }


def cancel(host: Host, steps: int, run) -> None:
    """Presses Cancel after so many sampling steps of run()."""
    import comfy.model_management as mm

    progress, done = host.module("nodes.comfyui.sampling").Progress, 0
    step = progress.step

    def counted(self, *args):
        nonlocal done
        done += 1
        if done == steps:
            mm.interrupt_current_processing()
        step(self, *args)

    progress.step = counted
    try:
        run()
        raise AssertionError("it was not interrupted")
    except mm.InterruptProcessingException:
        pass
    finally:
        progress.step = step


def through_the_node(host: Host) -> dict[str, Any]:
    """Cancelled, then run again with the same inputs, then once more, and with a damaged partial file."""
    node, files = host.node("QandC_TAPCalibrate"), host.module("nodes.comfyui.files")
    case, wires = demo_case(host), dict(zip(("positive", "negative"), class_labels(host)))
    (wires["latent_image"],) = host.nodes.EmptyLatentImage().generate(32, 32, 1)
    folder, before = files.calibration_folder(), files.calibration_files()

    def tap(seed: int = 501, prefix: str = "inside_tap", file: str = "new", held_out: int = 2, tokens: int = 128):
        given = (file, 4, FEW, STEPS, 1.5, "ddpm", "normal", seed, 2, "tap", 4, 5.0, True, True, prefix)
        return node.execute(
            case.patcher, *given, **wires, memory_gb=1.0, tokens=tokens, held_out=held_out
        ).args[0]  # fmt: skip

    cancel(host, 3 * STEPS + 2, tap)
    partial = list(folder.glob("inside_tap-*.partial"))
    kept, listed = len(partial), files.calibration_files() == before
    content = partial[0].read_bytes()
    found = tap()
    left, new = len(list(folder.glob("inside_tap-*"))), set(files.calibration_files()) - set(before)
    saved = host.module("qandc_core").load_calibration(folder / new.pop())
    again, sampled = tap(), watched_steps(host, tap)
    same = len(new) == 0 and len(set(files.calibration_files()) - set(before)) == 1
    next_to_it = set(files.calibration_files())
    other = tap(502)
    others = sorted(set(files.calibration_files()) - next_to_it)
    partial[0].write_bytes(content[:-1000])
    next(folder.glob("inside_tap_*_00001.safetensors")).unlink()
    afresh = tap()
    layers = found.statistics.values()
    return {
        "partial": kept, "not listed": listed, "left": left, "new": len(new) == 0, "saved": differing(saved, found),
        "again": differing(again, found), "sampled again": sampled, "one file": same, "others": others,
        "other seed": len(differing(other, found)) > 1, "afresh": differing(afresh, found),
        "damaged": [p.name.endswith(".partial.damaged") for p in folder.glob("inside_tap-*")],
        "held out": [len(found.held_out), len(tap(503, "none", held_out=0).held_out)],
        "rows": max(len(layer.inputs) for layer in layers if layer.inputs is not None),
        "names": names(host, tap),
    }  # fmt: skip


def node_inputs(host: Host) -> bool:
    """Whether the node calibrates with what it is given, all of it at other than its defaults."""
    case, run = demo_case(host), host.module("nodes.comfyui.calibrate.run")
    (latent,) = host.nodes.EmptyLatentImage().generate(32, 32, 1)
    given = ("new", 3, 9, 4, 2.0, "ddim", "karras", 77, 1, "stratified", 3, 2.5, False, False, "handed")
    found = host.node("QandC_TAPCalibrate").execute(
        case.patcher, *given, *class_labels(host), latent, memory_gb=0.5, tokens=99, held_out=3
    ).args[0]  # fmt: skip
    settings = host.module("nodes.comfyui.sampling").Settings(*class_labels(host), 4, 2.0, "ddim", "karras")
    plan = run.CalibrationConfig(
        trajectories=3, batch_size=1, samples=9, selection="stratified", clusters=3, time_scale=2.5,
        computed_only=False, hessians=False, seed=77, memory_gb=0.5, tokens=99, held_out=3, prompts=1,
        rows=max(settings.rows()), surplus=2.0,
    )  # fmt: skip
    prepared = host.module("nodes.comfyui.sampling").prepared(case.patcher, latent)
    expected = run.digest_of(case.patcher, settings, prepared, plan)
    return expected.known and found.notes["inputs"] == expected.hex


def watched_steps(host: Host, run) -> int:
    """How many sampling steps run() takes."""
    progress, steps = host.module("nodes.comfyui.sampling").Progress, 0
    step = progress.step

    def counted(self, *args):
        nonlocal steps
        steps += 1
        step(self, *args)

    progress.step = counted
    try:
        run()
    finally:
        progress.step = step
    return steps


def names(host: Host, tap) -> dict[str, list[str]]:
    """Names of files: those listed and refused, not listed, absent ones that are made, prefixes."""
    files = host.module("nodes.comfyui.files")
    folder = files.calibration_folder()
    content = next(folder.glob("inside_tap_*.safetensors")).read_bytes()
    given = [
        "a [fp8].safetensors", "flux, 50.safetensors", "dev@v1.safetensors", "\u6807\u5b9a\uff08v2\uff09.safetensors",
        "it's.safetensors",
        "cafe\u0301.safetensors", "50%;a=b&c#~!.safetensors", "NUL.safetensors", "a .safetensors", "a..safetensors",
        "\U0001f600.safetensors", "new\nline.safetensors", "back\\slash.safetensors", ".hidden.safetensors",
        "not utf8 \udcff.safetensors", "x.safetensors.", "..safetensors", "a\u2028b.safetensors",
    ]  # fmt: skip
    result: dict[str, list[str]] = {"refused": [], "not listed": [], "loaded unlisted": []}
    for name in given:
        (folder / name).write_bytes(content)
        if name not in files.calibration_files():
            result["not listed"].append(ascii(name))
            continue
        try:
            files.file_state(name), tap(file=name)
        except ValueError as error:
            result["refused"].append(f"{ascii(name)}: {error}")
    for name in given:
        (folder / name).unlink()
    (folder / "a folder.safetensors").mkdir()
    result["folder listed"] = [name for name in files.calibration_files() if "folder" in name]
    (folder / "a folder.safetensors").rmdir()
    return result


def disk(host: Host) -> dict[str, Any]:
    """A full disk and a folder that cannot be written: what is said, what is left, and whether the next run works."""
    import resource

    files, folder = host.module("nodes.comfyui.files"), host.module("nodes.comfyui.files").calibration_folder()
    case, core = family_case(host, "Flux"), host.module("qandc_core")
    calibration = case.calibrate(trajectories=2, samples=2)
    messages = []
    before = sorted(path.name for path in folder.iterdir())
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        files.save_new(calibration.save, "full")
    except OSError as error:
        messages.append(str(error))
    partial = Path(host.base, "full.partial")
    try:
        resumed = case.calibrate(partial, trajectories=2, samples=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    unfinished = partial.exists()
    left = sorted(path.name for path in folder.iterdir())
    path = files.save_new(calibration.save, "full")
    again = differing(core.load_calibration(path), calibration)
    moved = folder.rename(folder.with_name("elsewhere"))
    folder.write_bytes(b"")
    try:
        files.check_writable()
    except OSError as error:
        messages.append(str(error))
    listed = files.calibration_files()
    folder.unlink()
    moved.rename(folder)
    return {
        "messages": messages, "left": left == before, "again": again, "listed": listed, "unfinished": unfinished,
        "resumed": differing(resumed, calibration),
    }  # fmt: skip


def self_tested(host: Host) -> dict[str, Any]:
    """Inputs counted and kept with a cache that tests itself at the first step, and with one that does not: the same
    steps, and as many rows of each.
    """
    apply_cache = host.module("nodes.comfyui.cache.attach").apply_cache

    def counts(reuse: str) -> dict[str, tuple[int, int]]:
        case = family_case(host, "Flux")
        case.patcher = apply_cache(case.patcher, cache_policy(host, 2, reuse=reuse))
        found = case.calibrate(trajectories=2, samples=1000, held_out=0)
        kept = {name: 0 if layer.inputs is None else len(layer.inputs) for name, layer in found.statistics.items()}
        return {name: (layer.count, kept[name]) for name, layer in found.statistics.items()}

    tested, untested = counts("blocks"), counts("whole prediction")
    return {"layers": len(tested), "different": [name for name, count in tested.items() if count != untested[name]]}


def prompts_seen(host: Host) -> dict[str, Any]:
    """Which of five prompts in one CONDITIONING the images of a calibration have, two at once, the last held out."""
    case = family_case(host, "Flux")
    contexts, options = case.settings.positive[0]
    prompts = torch.cat([contexts + i for i in range(5)])
    pooled = torch.cat([options["pooled_output"] + 10 * i for i in range(5)])
    positive = [[prompts, {**options, "pooled_output": pooled}]]
    case = replace(case, settings=replace(case.settings, positive=positive, cfg=1.0))
    seen: list[set[int]] = [set(), set()]

    def watch(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        for row in c_crossattn:
            seen[0].add(int((row[None].float() - contexts.float()).mean().round()))
        for row in kwargs["y"]:
            seen[1].add(int((row[None].float() - options["pooled_output"].float()).mean().div(10).round()))
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    case.sample(watch, trajectories=6)
    last = case.calibrate(trajectories=5, held_out=2).held_out
    apart = {int((call.conditions["c_crossattn"].float() - contexts.float()).mean().round()) for call in last}
    return {"prompts": sorted(seen[0]), "pooled": sorted(seen[1]), "held out": sorted(apart)}


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
        "controls": resumes_with_other_controls,
        "prompts": prompts_seen,
        "self-test": self_tested,
        "disk": disk,
        "node": through_the_node,
        "node's inputs": node_inputs,
    })  # fmt: skip
