"""Sample, Variance Compensate and Class Label on every kind of latent and conditioning that stock nodes sample."""

from __future__ import annotations

import dataclasses

import families
import torch
from family_list import FAMILIES
from host import Host, main, relative
from sampling import demo

STEPS, CFG, SEED = 6, 2.0, 11
KINDS = ("Wan 2.1", "LTX-AV", "MiniMax H3", "ACE-Step", "Stable Audio")
FIT = (STEPS, CFG, "euler", "simple", 502, "variance_match")


def patcher_of(name: str):
    import comfy.supported_models

    family = FAMILIES[name]
    return families.build(family) if hasattr(comfy.supported_models, family.config) else None


def ksampler(host: Host, patcher, positive, negative, latent, denoise=1.0, **settings):
    chosen = {"steps": STEPS, "cfg": CFG, "sampler": "euler", "scheduler": "simple", "seed": SEED, **settings}
    (out,) = host.nodes.common_ksampler(
        patcher, chosen["seed"], chosen["steps"], chosen["cfg"], chosen["sampler"], chosen["scheduler"], positive,
        negative, latent, denoise=denoise,
    )  # fmt: skip
    return out


def sampled(host: Host, patcher, positive, negative, latent, denoise=1.0):
    return (
        host.node("QandC_Sample")
        .execute(patcher, positive, negative, latent, SEED, STEPS, CFG, "euler", "simple", denoise, "")
        .args
    )


def equal(a: dict, b: dict) -> bool:
    """Every entry of two LATENTs, bit for bit."""
    parts = [families.flat(latent["samples"]) for latent in (a, b)]
    rest = all(a[key] is b[key] for key in b if key != "samples")
    return set(a) == set(b) and rest and torch.equal(*parts)


def with_mask(latent):
    """A mask over the right half of a latent's first part, as SetLatentNoiseMask gives it."""
    part = latent.unbind()[0] if latent.is_nested else latent
    mask = torch.zeros(1, *part.shape[-2:])
    mask[..., part.shape[-1] // 2 :] = 1
    return mask


def sample_equals_ksampler(host: Host) -> dict[str, list]:
    """On each kind: plain, with a mask over a given image, with batch_index, and with denoise, also of zero."""
    found = {}
    for name in KINDS:
        patcher = patcher_of(name)
        if patcher is None:
            continue
        _, positive, negative, empty = families.inputs(FAMILIES[name])
        given = ksampler(host, patcher, positive, negative, {"samples": empty}, seed=3)["samples"]
        latents = {
            "plain": ({"samples": empty}, 1.0),
            "again": ({"samples": given}, 0.5),
            "nothing": ({"samples": given}, 0.0),
            "batch_index": ({"samples": empty, "batch_index": [4]}, 1.0),
        }
        if not name.startswith("Stable"):
            latents["mask"] = ({"samples": given, "noise_mask": with_mask(given)}, 1.0)
        for case, (latent, denoise) in latents.items():
            out, report = sampled(host, patcher, positive, negative, latent, denoise)
            stock = ksampler(host, patcher, positive, negative, latent, denoise)
            found[f"{name}, {case}"] = [equal(out, stock), len(report.seconds), report.steps, report.size]
    return found


def fit(host: Host, fast, reference, positive, negative, latent, pairs=3, settings=FIT, bounds=(0.0, 1.0)):
    node = host.node("QandC_VarianceCompensate")
    return node.execute(
        fast, reference, "new", pairs, *settings, *bounds, "kinds", positive, negative, {"samples": latent}
    ).args[0]


def saved(host: Host):
    path = max((host.base / "output" / "qandc").glob("kinds*"), key=lambda path: path.stat().st_mtime)
    return path.name, host.module("qandc_core").load_calibration(path)


class Samples:
    """What the model is given in each prediction, in parts."""

    def __init__(self, shapes):
        self.shapes, self.seen = shapes, []

    def __call__(self, executor, x, timestep, *args):
        flat = x.flatten(1).split([torch.Size(shape).numel() for shape in self.shapes], dim=1)
        self.seen.append([part.unflatten(1, shape) for part, shape in zip(flat, self.shapes)])
        return executor(x, timestep, *args)


def compensation_works_per_part(host: Host) -> dict[str, dict]:
    """After the correction every channel of every part deviates as the reference's does, at every step (Eq. 9)."""
    import comfy.nested_tensor

    found = {}
    for name in KINDS:
        patcher = patcher_of(name)
        if patcher is None:
            continue
        _, positive, negative, empty = families.inputs(FAMILIES[name])
        fast = families.cached(host, patcher, 2, "whole prediction")
        if name == "MiniMax H3":
            found[name] = {"refused": message(fit, host, fast, patcher, positive, negative, empty)}
            continue
        corrected = fit(host, fast, patcher, positive, negative, empty)
        parts = empty.unbind() if empty.is_nested else [empty]
        shapes = [tuple(part.shape[1:]) for part in parts]
        three = [torch.zeros(3, *shape) for shape in shapes]
        latent = comfy.nested_tensor.NestedTensor(three) if empty.is_nested else three[0]
        seen = []
        for model in (patcher, corrected, fast):
            watched, watch = model.clone(), Samples(shapes)
            watched.add_wrapper_with_key("predict_noise", "watch", watch)
            ksampler(host, watched, positive, negative, {"samples": latent}, seed=502)
            seen.append(watch.seen)
        _, report = sampled(host, corrected, positive, negative, {"samples": empty})
        found[name] = {
            "deviation": worst(seen[0], seen[1]),
            "deviation before": worst(seen[0], seen[2]),
            "factors": [len(report.factors), len(report.factors[0])],
            "channels": [shape[0] for shape in shapes],
            "noted": saved(host)[1].notes["channels"],
        }
    return found


def worst(wanted, seen) -> float:
    def deviations(parts):
        return torch.cat([part.double().transpose(0, 1).flatten(1).std(1) for part in parts])

    return max(float((deviations(b) / deviations(a) - 1).abs().max()) for a, b in zip(wanted, seen))


def message(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def labels(host: Host, text: str):
    return host.node("QandC_ClassLabel").execute(text, "none").args


def compensation_is_used_where_it_belongs(host: Host) -> dict[str, str]:
    """Runs of another kind end in one sentence, before the model is called."""
    import comfy.samplers

    reference, (positive, negative) = demo(host), labels(host, "0-3")
    fast = families.cached(host, reference, 3, "whole prediction")
    empty, latent = torch.zeros(1, 3, 32, 32), {"samples": torch.zeros(2, 3, 32, 32)}
    settings = (STEPS, CFG, "euler_ancestral", "normal", 502, "variance_match")
    corrected = fit(host, fast, reference, positive, negative, empty, settings=settings)
    run = {"sampler": "euler_ancestral", "scheduler": "normal"}
    calls = []
    reference.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))

    def tries(patcher, denoise=1.0, **changed) -> str:
        calls.clear()
        said = message(ksampler, host, patcher, positive, negative, latent, denoise, **{**run, **changed})
        return f"{said} ({len(calls)} calls)"

    def custom(eta: float, first: int = 0, noise: float = 1.0) -> str:
        sampler = comfy.samplers.ksampler("euler_ancestral", {"eta": eta, "s_noise": 1.0})
        sigmas = comfy.samplers.calculate_sigmas(reference.get_model_object("model_sampling"), "normal", STEPS)
        return message(
            comfy.sample.sample_custom, corrected, latent["samples"] + noise, CFG, sampler, sigmas[first:], positive,
            negative, latent["samples"] + 1, disable_pbar=True, seed=1,
        )  # fmt: skip

    def other_guider() -> str:
        from comfy_extras.nodes_custom_sampler import Guider_DualCFG

        guider, empty = Guider_DualCFG(corrected), latent["samples"]
        guider.set_conds(positive, positive, negative)
        guider.set_cfg(CFG, CFG)
        sampler = comfy.samplers.ksampler("euler_ancestral")
        return message(guider.sample, empty + 1, empty, sampler, torch.tensor([5.0, 0.0]), disable_pbar=True)

    name, _ = saved(host)
    node = host.node("QandC_VarianceCompensate")

    def load(model, of) -> str:
        return message(node.execute, model, of, name, 2, *settings, 0.0, 1.0, "kinds", positive, negative, latent)

    def load_of_an_older_version() -> str:
        """Its notes had the settings, the sampler's function and what was attached."""
        path = host.base / "output" / "qandc" / name
        calibration = saved(host)[1]
        kept = ("sampler", "scheduler", "steps", "cfg", "pairs", "sampler_function", "attached")
        notes = {key: calibration.notes[key] for key in kept}
        older = path.with_name("older.safetensors")
        dataclasses.replace(calibration, notes=notes).save(older)
        (model,) = node.execute(
            fast, reference, older.name, 2, *settings, 0.0, 1.0, "kinds", positive, negative, latent
        ).args
        stock = ksampler(host, corrected, positive, negative, latent, **run)["samples"]
        same = torch.equal(ksampler(host, model, positive, negative, latent, **run)["samples"], stock)
        return "nothing was refused" if same else "another image"

    other = demo(host)
    other.model.diffusion_model.qandc_fingerprint = "0" * 32

    def fits(**changed) -> str:
        chosen = dict(zip(("steps", "cfg", "sampler", "scheduler", "seed", "method"), settings)) | changed
        bounds = chosen.pop("bounds", (0.0, 1.0))
        calls.clear()
        said = message(
            fit, host, fast, chosen.pop("reference", reference), positive, negative, empty,
            settings=tuple(chosen.values()), bounds=bounds,
        )  # fmt: skip
        return f"{said} ({len(calls)} calls)"

    return {
        "same": tries(corrected),
        "same eta": custom(1.0),
        "other eta": custom(0.5),
        "second stage": custom(1.0, first=2, noise=0.0),
        "no steps": custom(1.0, first=STEPS),
        "new noise in mid-schedule": custom(1.0, first=2),
        "other guider": other_guider(),
        "other sampler": tries(corrected, sampler="euler"),
        "other cfg": tries(corrected, cfg=1.5),
        "other steps": tries(corrected, steps=STEPS + 1),
        "other scheduler": tries(corrected, scheduler="karras"),
        "part of the schedule": tries(corrected, 0.5),
        "other cache": tries(families.cached(host, corrected, 2, "whole prediction")),
        "same file": load(fast, reference),
        "older file": load_of_an_older_version(),
        "file, other model": load(families.cached(host, other, 3, "whole prediction"), reference),
        "file, other cache": load(reference, reference),
        "file, other reference": load(fast, other),
        "empty bounds": fits(bounds=(0.6, 0.4)),
        "nan bounds": fits(bounds=(float("nan"), 1.0)),
        "nan cfg": fits(cfg=float("nan")),
        "method": fits(method="mean"),
        "free sampler": fits(sampler="dpm_fast"),
        "other kind of model": fits(reference=patcher_of("Wan 2.1")),
        "part": " ".join(str(int(bool((k != 1).any()))) for k in part(host, fast, reference, positive, negative)),
    }


def part(host: Host, fast, reference, positive, negative):
    """Factors of a fit between 0.5 and 0.7 of the run."""
    settings = (STEPS, CFG, "euler", "normal", 502, "variance_match")
    empty = torch.zeros(1, 3, 32, 32)
    fit(host, fast, reference, positive, negative, empty, settings=settings, bounds=(0.5, 0.7))
    return saved(host)[1].variance.factor


def class_label_composes(host: Host) -> dict:
    """Each stock conditioning node on Class Label, sampled, against the conditioning that it should amount to."""
    nodes, patcher = host.nodes.NODE_CLASS_MAPPINGS, demo(host)
    (three, none), (seven, _), (pair, _) = labels(host, "3"), labels(host, "7"), labels(host, "3, 7")

    def call(name, *args, **kwargs):
        node = nodes[name]
        return getattr(node(), node.FUNCTION)(*args, **kwargs)[0]

    def run(positive, negative=none, images=2):
        latent = {"samples": torch.zeros(images, 3, 32, 32)}
        return ksampler(host, patcher, positive, negative, latent, scheduler="normal")["samples"]

    def same(a, b) -> bool:
        return torch.equal(a, b)

    settings, average = host.module("nodes.comfyui.settings"), "ConditioningAverage"
    from_image, converted = settings.from_image, settings.converted
    half = call("ConditioningSetTimestepRange", three, 0.0, 0.5), call("ConditioningSetTimestepRange", seven, 0.5, 1.0)
    mask = torch.zeros(1, 32, 32)
    mask[:, :, 16:] = 1
    masked = [call("ConditioningSetMask", c, m, "default", 1.0) for c, m in ((three, mask), (seven, 1 - mask))]
    areas = [call("ConditioningSetAreaPercentage", c, 0.5, 1.0, x, 0.0, 1.0) for c, x in ((three, 0.0), (seven, 0.5))]
    combine = "ConditioningCombine"
    mixed = "whole classes"
    return {
        "zero out is no class": same(run(three, call("ConditioningZeroOut", three)), run(three)),
        "zeroed list is no class": same(run(three, call("ConditioningZeroOut", pair)), run(three)),
        "average, 1": same(run(call(average, three, seven, 1.0)), run(three)),
        "average, 0": same(run(call(average, three, seven, 0.0)), run(seven)),
        "average of a class with itself": same(run(call(average, seven, seven, 0.3)), run(seven)),
        "average of two": mixed in message(run, call(average, three, seven, 0.5)),
        "average with none": mixed in message(run, call(average, three, none, 0.5)),
        "concat is a longer list": same(run(call("ConditioningConcat", three, seven)), run(pair)),
        "multiply": "ConditioningMultiply" not in nodes or mixed in message(
            run, call("ConditioningMultiply", three, 0.5)
        ),
        "combine": finite(run(call(combine, three, seven)), run(three)),
        "timestep ranges": finite(run(call(combine, *half)), run(three)),
        "masks": finite(run(call(combine, *masked)), run(three)),
        "areas": finite(run(call(combine, *areas)), run(three)),
        "area strength": same(run(call("ConditioningSetAreaStrength", three, 1.0)), run(three)),
        "area in pixels": finite(run(call("ConditioningSetArea", three, 128, 256, 0, 0, 1.0)), run(seven)),
        "options dropped": same(run([[three[0][0].clone(), {}]]), run(three)),
        "text, zeroed too": "not text" in message(run, three, [[torch.zeros(1, 77, 768), {}]]),
        "a list goes on": same(
            from_image(converted(pair), 1)[0]["cross_attn"], labels(host, "7, 3")[0][0][0]
        ),
    }  # fmt: skip


def finite(out, other) -> bool:
    return bool(out.isfinite().all()) and relative(out, other) > 1e-3


if __name__ == "__main__":
    main({
        "Sample": sample_equals_ksampler,
        "parts": compensation_works_per_part,
        "belongs": compensation_is_used_where_it_belongs,
        "Class Label": class_label_composes,
    })  # fmt: skip
