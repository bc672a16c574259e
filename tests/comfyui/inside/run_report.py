"""Run Report behind every kind of stock sampler: the same images, and what the report says of them."""

from __future__ import annotations

from functools import partial

import families
import torch
from family_list import FAMILIES
from host import Host, main
from sampling import demo

STEPS, CFG, SEED = 6, 2.0, 11


def labels(host: Host):
    return host.node("QandC_ClassLabel").execute("0-9", "none").args


def recorded(host: Host, patcher, label: str = "", before=None):
    return host.node("QandC_RunReport").execute(patcher, label, before).args


def cached(host: Host, patcher):
    policy = {"policy": "chosen steps", "computed_steps": "0, 1, 3, 5"}
    return host.node("QandC_ApplyCache").execute(patcher, policy, 0).args[0]


def latent(count: int = 2):
    return {"samples": torch.zeros(count, 3, 32, 32)}


class Job:
    """Executes as a sampler node of a job does."""

    def __init__(self, job: str, node: str):
        from comfy_execution.utils import CurrentNodeContext

        self.context = CurrentNodeContext(job, node)

    def __enter__(self):
        return self.context.__enter__()

    def __exit__(self, *error):
        return self.context.__exit__(*error)


def ksampler(host: Host, patcher, positive, negative, sampler="euler", **options):
    return host.nodes.common_ksampler(
        patcher, SEED, STEPS, CFG, sampler, "normal", positive, negative, latent(), **options
    )[0]["samples"]  # fmt: skip


def advanced(host: Host, patcher, positive, negative, first=None, given=None):
    """Both halves, or the second alone on what the first gave."""
    half = {"disable_noise": first is not None, "start_step": 0, "last_step": 3, "force_full_denoise": False}
    if first is not None:
        half = {"disable_noise": True, "start_step": 3, "last_step": 1000, "force_full_denoise": True}
    return host.nodes.common_ksampler(
        patcher, SEED, STEPS, CFG, "euler", "normal", positive, negative, {"samples": first} if first is not None
        else latent(), **half
    )[0]["samples"]  # fmt: skip


def custom(host: Host, patcher, positive, negative, guider="cfg", sampler="euler"):
    """SamplerCustomAdvanced with a guider of core."""
    import comfy.samplers
    from comfy_extras import nodes_custom_sampler as stock

    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "karras", STEPS)
    chosen = stock.Guider_Basic(patcher) if guider == "basic" else comfy.samplers.CFGGuider(patcher)
    chosen.set_conds(positive) if guider == "basic" else chosen.set_conds(positive, negative)
    if guider == "cfg":
        chosen.set_cfg(CFG)
    noise = stock.Noise_RandomNoise(SEED)
    return chosen.sample(
        noise.generate_noise(latent()), latent()["samples"], comfy.samplers.sampler_object(sampler), sigmas,
        disable_pbar=True, seed=noise.seed,
    )  # fmt: skip


SAMPLERS = {
    "KSampler": ksampler,
    "KSampler, heun": lambda *inputs: ksampler(*inputs, sampler="heun"),
    "KSampler, uni_pc": lambda *inputs: ksampler(*inputs, sampler="uni_pc"),
    "KSampler, dpmpp_sde": lambda *inputs: ksampler(*inputs, sampler="dpmpp_sde"),
    "CFGGuider": custom,
    "BasicGuider": lambda *inputs: custom(*inputs, guider="basic"),
}


def described(report) -> dict:
    return {
        "steps": report.steps, "times": len(report.seconds), "positive": all(s > 0 for s in report.seconds),
        "solver": report.solver, "seed": report.seed, "cfg": report.cfg_scale, "size": report.size,
        "images": report.images, "levels": len(report.sigmas), "computed": sum(report.computed),
        "flags": len(report.computed), "finished": report.finished, "parts": report.parts,
    }  # fmt: skip


def every_sampler(host: Host) -> dict[str, list]:
    """Images with and without Run Report; its report, that of a repetition, and with the cache before and after it."""
    positive, negative = labels(host)
    found = {}
    for name, sample in SAMPLERS.items():
        plain = demo(host)
        stock = sample(host, plain, positive, negative)
        measured, recorder = recorded(host, plain)
        same = torch.equal(sample(host, measured, positive, negative), stock)
        ticks: list[int] = []
        again = recorder.report().replay(partial(ticks.append, 1))
        unchanged = described(recorder.report())["times"]
        found[name] = {
            "same": same, **described(recorder.report()), "again": described(again) == described(recorder.report()),
            "ticks": len(ticks), "unchanged": unchanged,
        }  # fmt: skip
        for order in ("cache first", "report first"):
            if order == "cache first":
                model, recorder = recorded(host, cached(host, plain))
            else:
                model, recorder = recorded(host, plain)
                model = cached(host, model)
            sample(host, model, positive, negative)
            report = recorder.report()
            found[name][order] = [sum(report.computed), len(report.computed), report.cache_bytes > 0, report.label]
    return found


def jobs(host: Host) -> dict[str, dict]:
    """Halves of a schedule, cached nodes, two recorders, Sample behind Run Report, two models in turn."""
    positive, negative = labels(host)
    model, recorder = recorded(host, demo(host))
    with Job("one", "3"):
        first = advanced(host, model, positive, negative)
    alone = described(recorder.report())
    with Job("one", "4"):
        advanced(host, model, positive, negative, first)
    both = recorder.report()
    with Job("two", "4"):
        advanced(host, model, positive, negative, first)
    later = recorder.report()
    with Job("three", "3"):
        ksampler(host, model, positive, negative)
    replaced = recorder.report()

    outer, one = recorded(host, demo(host), "one")
    inner, two = recorded(host, outer, "two")
    with Job("four", "5"):
        latent_image = latent()
        _, own = host.node("QandC_Sample").execute(
            inner, positive, negative, latent_image, SEED, STEPS, CFG, "euler", "normal", 1.0, "own"
        ).args  # fmt: skip

    high, first_report = recorded(host, demo(host), "expert")
    low, whole = recorded(host, demo(host), "", first_report)
    with Job("five", "6"):
        half = advanced(host, high, positive, negative)
    with Job("five", "7"):
        advanced(host, low, positive, negative, half)
    return {
        "first half": alone,
        "both": described(both),
        "later": {**described(later), "job": later.job},
        "replaced": described(replaced),
        "chain": [described(r) for r in (one.report(), two.report(), own)],
        "names": [r.label for r in (one.report(), two.report(), own)],
        "experts": described(whole.report()),
        "repeated": described(both.replay(lambda: None)),
        "empty": recorded(host, demo(host))[1].report(),
    }


def interrupted(host: Host) -> dict:
    """A run that ends in its third step, and the one after it."""
    import comfy.model_management
    import comfy.sample

    positive, negative = labels(host)
    model, recorder = recorded(host, cached(host, demo(host)))

    def cancel(step, *_):
        if step == 2:
            raise comfy.model_management.InterruptProcessingException()

    noise = comfy.sample.prepare_noise(latent()["samples"], SEED)
    settings = (STEPS, CFG, "euler", "normal", positive, negative, latent()["samples"])
    with Job("one", "3"):
        try:
            comfy.sample.sample(model, noise, *settings, callback=cancel, disable_pbar=True, seed=SEED)
        except comfy.model_management.InterruptProcessingException:
            pass
    ended = recorder.report()
    words = host.module("nodes.comfyui.reporting").report_words(ended)
    before = {"finished": ended.finished, "times": len(ended.seconds), "replay": ended.replay is None, "words": words}
    with Job("two", "3"):
        ksampler(host, model, positive, negative)
    return {**before, "then": described(recorder.report())}


def nested(host: Host) -> dict[str, list]:
    """Video with sound in one latent."""
    import comfy.supported_models

    found = {}
    for name in ("LTX-AV",):
        family = FAMILIES[name]
        if not hasattr(comfy.supported_models, family.config):
            continue
        _, positive, negative, empty = families.inputs(family)
        model, recorder = recorded(host, families.build(family))
        host.nodes.common_ksampler(
            model, SEED, 3, CFG, "euler", "simple", positive, negative, {"samples": empty}
        )  # fmt: skip
        report = recorder.report()
        again = report.replay(lambda: None)
        found[name] = [report.size, [list(part.shape[1:]) for part in empty.unbind()], again.size, len(again.seconds)]
    return found


def calibrated(host: Host) -> list[int]:
    """Runs that Calibrate from Runs holds after a run and after its repetition."""
    positive, negative = labels(host)
    node = host.module("nodes.calibrate_from_runs").CalibrateFromRuns
    settings = {
        "record": True,
        "samples": 2,
        "hessians": False,
        "memory_gb": 1.0,
        "tokens": 64,
        "held_out": 0,
        "reset": 0,
    }
    model, _ = node.execute(model=demo(host), name="repeated", **settings).args
    measured, recorder = recorded(host, model)
    load, counts = host.module("qandc_core").load_calibration, []
    for sample in (lambda: ksampler(host, measured, positive, negative), lambda: recorder.report().replay(int)):
        sample()
        host.module("nodes.comfyui.calibrate.recording").settle()
        (path,) = (host.base / "output" / "qandc").glob("repeated*")
        counts.append(load(path).recording.describe())
    return counts


def digests(host: Host) -> bool:
    """What a calibration depends on is the same with and without Run Report on the model."""
    digest = host.module("nodes.comfyui.calibrate.inputs").digest_of_inputs
    plain = demo(host)
    found = [digest(patcher) for patcher in (plain, recorded(host, plain)[0], recorded(host, cached(host, plain))[0])]
    return found[0].hex == found[1].hex and found[0].known and found[2].known


def sizes(host: Host) -> dict[str, list]:
    """Warnings of the built-in model at its own size and at others."""
    positive, negative = labels(host)
    model, recorder = recorded(host, demo(host))
    found = {}
    for rows, cols in ((32, 32), (32, 48), (96, 96), (16, 16)):
        empty = {"samples": torch.zeros(1, 3, rows, cols)}
        host.nodes.common_ksampler(model, SEED, 1, CFG, "euler", "normal", positive, negative, empty)
        found[f"{cols} x {rows}"] = recorder.report().warnings
    return found


if __name__ == "__main__":
    checks = {
        "samplers": every_sampler, "jobs": jobs, "interrupted": interrupted, "nested": nested, "sizes": sizes,
        "calibrated": calibrated, "digests": digests,
    }  # fmt: skip
    main(checks)
