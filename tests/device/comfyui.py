"""Runs ComfyUI with the pack on the fake device: a program for ComfyUI's own Python, with a CUDA build of torch.

argv: checkout, base directory, mode. "half" is what ComfyUI chooses for this device, "low" leaves nearly all weights on
the host as where the model does not fit; "pages" is dynamic VRAM, core's default on NVIDIA, and "refused" the same
where VRAM is short. Prints one JSON object: check -> value.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from concurrent import futures
from concurrent.futures import Executor, Future
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "comfyui" / "inside")]
import fake  # noqa: E402
import host  # noqa: E402
import pages  # noqa: E402
import real  # noqa: E402
from quantized_families import save  # noqa: E402

COMMON = ("--disable-pinned-memory", "--disable-async-offload")
FULL = ("--force-fp32", *COMMON)
FLAGS = {"half": COMMON, "low": FULL, "pages": COMMON, "refused": FULL}
REFUSED = 3  # every third request for pages
STEPS = 4
LABELS = "0,3"


def kernels_of_torch() -> None:
    """comfy-kitchen's own kernels need a real GPU."""
    import comfy_kitchen

    for backend in () if real.WANTED else ("cuda", "triton"):
        comfy_kitchen.disable_backend(backend)


def short_of_memory() -> None:
    import comfy.model_management as mm

    mm.get_free_memory = lambda dev=None, torch_free_too=False: (2**20, 2**20) if torch_free_too else 2**20
    mm.minimum_inference_memory = lambda: 0
    mm.vram_state = mm.set_vram_to = mm.VRAMState.LOW_VRAM


def main() -> None:
    checkout, base, mode = sys.argv[1:]
    with fake.device() as device:
        h = host.Host(checkout, base, FLAGS[mode], dynamic=real.WANTED and mode == "pages")
        kernels_of_torch()
        if mode == "low":
            short_of_memory()
        if mode in ("pages", "refused") and not real.WANTED:
            pages.enable(REFUSED if mode == "refused" else 0)
        print("RESULTS " + json.dumps(Checks(h, device).found()))


@contextlib.contextmanager
def cpu_chosen():
    """Models that are made within stay on the CPU."""
    import comfy.model_management as mm
    import torch

    with mock.patch.object(mm, "get_torch_device", lambda: torch.device("cpu")):
        yield


class InThisThread(Executor):
    """Other threads do not see the fake device."""

    def submit(self, function, /, *args, **kwargs):
        done = Future()
        try:
            done.set_result(function(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


class Later(Executor):
    """Work of another thread that has not begun when the run returns, unless the run waits for it."""

    def __init__(self):
        self.work = []

    def submit(self, function, /, *args, **kwargs):
        done = Future()
        self.work.append(lambda: done.set_result(function(*args, **kwargs)))
        return done

    def finish(self) -> None:
        while self.work:
            self.work.pop(0)()

    def wait(self, awaited, timeout: float | None = None):
        if timeout is None:
            self.finish()
        return futures.wait(awaited, 0)


class Checks:
    def __init__(self, h: host.Host, device: fake.FakeDevice):
        self.h, self.device = h, device
        self.positive, self.negative = h.node("QandC_ClassLabel").execute(LABELS, "none").args
        (self.latent,) = h.nodes.EmptyLatentImage().generate(32, 32, len(LABELS.split(",")))

    def load(self):
        return self.h.node("QandC_LoadDiT").execute("built-in demo", "auto", "auto").args[0]

    def cached(self, model, policy=None):
        policy = policy or {"policy": "interval", "interval": 2}
        return self.h.node("QandC_ApplyCache").execute(model, policy, 1).args[0]

    def quantized(self, model, format, method, loras="bake in"):
        return self.h.node("QandC_Quantize").execute(model, format, method, 0.3, 0, "", loras, "auto").args[0]

    def with_lora(self, model):
        """A LoRA that changes the images by about a tenth."""
        import comfy.sd
        import torch

        name, g = "diffusion_model.blocks.0.mlp.fc1", torch.Generator().manual_seed(2)
        rows, columns = model.model.diffusion_model.blocks[0].mlp.fc1.weight.shape
        lora = {
            f"{name}.lora_B.weight": torch.randn(rows, 4, generator=g),
            f"{name}.lora_A.weight": torch.randn(4, columns, generator=g),
        }
        return comfy.sd.load_lora_for_models(model, None, lora, 0.03, 0)[0]

    def run(self, model, steps=STEPS):
        out, report = self.h.node("QandC_Sample").execute(
            model, positive=self.positive, negative=self.negative, latent_image=self.latent, seed=7, steps=steps,
            cfg=1.5, sampler_name="euler", scheduler="normal", denoise=1.0, label="",
        ).args  # fmt: skip
        return out["samples"].cpu(), report

    def variants(self):
        """Name -> model, all made anew."""
        plain = self.load()
        yield "plain", plain
        yield "cached", self.cached(plain)
        for format, method in (("W8A8", "paper"), ("W8A8", "native"), ("W4A8", "native")):
            yield f"{method} {format}", self.quantized(plain, format, method)
        patched = self.with_lora(plain)
        yield "lora", patched
        for loras in ("bake in", "keep on top"):
            yield f"lora {loras}", self.quantized(patched, "W8A8", "native", loras)

    def waits_for_a_prediction(self, model) -> float:
        """Beyond those that a run has once; by kind and place on stderr."""
        counts = []
        self.run(model)  # brings its weights back
        for steps in (STEPS, 2 * STEPS):
            self.device.waits.clear()
            self.run(model, steps)
            counts.append(sum(self.device.waits.values()))
        print(dict(self.device.waits), file=sys.stderr)
        return (counts[1] - counts[0]) / STEPS

    def reloaded(self, model) -> float:
        """How far the images of a saved model are from those of the file."""
        again = self.h.module("nodes.comfyui.model.dit").load_dit_patcher(str(save(model, "device")))
        return host.relative(self.run(again)[0], self.run(model)[0])

    def recorded(self, plain) -> dict:
        """Runs that Calibrate from Runs adds to a file: the image, what the file holds, waits for a prediction."""
        import torch

        recording = self.h.module("nodes.comfyui.calibrate.recording")
        recorder = (
            self.h.node("QandC_CalibrateFromRuns").execute(plain, "device", True, 8, True, 1.0, 800, 4, 0).args[0]
        )
        later = Later()
        with mock.patch.multiple(recording, adding=later, wait=later.wait, settle=lambda: None):
            waits = self.waits_for_a_prediction(recorder)
            until_returned = self.waits_of_a_run(recorder) - self.waits_of_a_run(plain)
        later.finish()
        recording.adding = InThisThread()
        same = torch.equal(self.run(recorder)[0], self.run(plain)[0])
        file = self.h.module("nodes.comfyui.files").named_path("device")
        made = self.h.module("qandc_core").load_calibration(file)
        layers = made.statistics.values()
        kinds = [kind for kind in ("hessian", "inputs") if any(getattr(s, kind) is not None for s in layers)]
        return {
            "same": same, "runs": made.recording.runs, "waits": waits, "layers": len(made.statistics),
            "kinds": kinds, "finite": all(bool(s.finite()) for s in layers),
            "measured": len(made.recording.history), "distances": made.distances is not None,
            "waits until it returns": until_returned,
        }  # fmt: skip

    def waits_of_a_run(self, model) -> int:
        self.run(model)  # brings its weights back
        self.device.waits.clear()
        self.run(model)
        return sum(self.device.waits.values())

    def halved(self, plain) -> dict:
        """TAP Calibrate of eight images at once where two fit, against two at once: layers that differ."""
        import torch

        def made(batch: int):
            return self.h.node("QandC_TAPCalibrate").execute(
                model=plain, trajectories=8, samples=12, steps=3, cfg=1.5, sampler_name="euler", scheduler="normal",
                batch_size=batch, selection="tap", clusters=3, filename_prefix=f"halved{batch}", held_out=0,
                positive=self.positive, negative=self.negative, latent_image=self.latent,
            ).args[0]  # fmt: skip

        def needed(batch: int):
            """The calibration, and the bytes beyond those that were held before."""
            gc.collect()
            self.device.reset_peak()
            before, found = self.device.held, made(batch)
            return found, self.device.peak - before

        self.run(plain)
        two, least = needed(2)
        _, more = needed(4)
        gc.collect()
        before = self.device.held
        self.device.limit = before + (least + more) // 2
        try:
            eight = made(8)
        finally:
            self.device.limit = fake.TOTAL
        gc.collect()
        differ = [
            name
            for name, layer in two.statistics.items()
            if not torch.equal(layer.second_moment().cpu(), eight.statistics[name].second_moment().cpu())
        ]
        return {
            "batch": eight.notes["batch_size"], "layers": len(two.statistics), "differ": differ,
            "samples": two.notes["samples"] == eight.notes["samples"],
            "needed": [least, more], "left over": self.device.held - before,
        }  # fmt: skip

    def found(self) -> dict:
        import comfy.model_management as mm

        with cpu_chosen():
            expected = {name: self.run(model)[0] for name, model in self.variants()}
        models = dict(self.variants())
        samples = {name: self.run(model)[0] for name, model in models.items()}
        found = {
            "device": str(mm.get_torch_device()),
            "dynamic": {name: model.is_dynamic() for name, model in models.items()},
            "to CPU": {name: host.relative(x, expected[name]) for name, x in samples.items()},
            "to plain": {name: host.relative(x, samples["plain"]) for name, x in samples.items()},
            "to lora": {name: host.relative(x, samples["lora"]) for name, x in samples.items() if "lora" in name},
            "reloaded": {name: self.reloaded(models[name]) for name in models if "native" in name or "paper" in name},
            "waits": {name: self.waits_for_a_prediction(models[name]) for name in ("plain", "cached")},
        }
        estimating = self.cached(models["plain"], {"policy": "error budget", "max_error": 1e-6, "max_reused": 4})
        found["waits"]["error budget"] = self.waits_for_a_prediction(estimating)
        _, report = self.run(models["plain"])
        found["peak memory"] = {
            "reported": report.peak_memory,
            "allocated": self.device.peak,
            "paged": sum(vbar.loaded_size() for vbar in getattr(models["plain"].model, "dynamic_vbars", {}).values()),
            "weights": models["plain"].model_size(),
        }
        found["requests"] = dict(pages.Pages.requests)
        found["recorded"] = self.recorded(models["plain"])
        found["halved"] = self.halved(models["plain"])
        found["offloaded"] = offloaded(self.h.node, lambda model: self.run(model)[0], models["plain"])
        return found


def offloaded(node, sample, plain) -> dict:
    """Where a run keeps its features with the node's offload off and on, and how far the second image is away."""
    images, found = [], {}
    for offload in (False, True):
        devices = set()

        def look(
            executor, x, t, c_concat, c_crossattn, control, transformer_options, devices=devices, **kwargs
        ):  # fmt: skip
            out = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
            runs = [cache.run for cache in transformer_options["qandc_cache"].caches.values()]
            devices.update(kept.device.type for run in runs for history in run.features.values() for _, kept in history)
            return out

        watched = plain.clone()
        watched.add_wrapper_with_key("apply_model", "look", look)
        policy = {"policy": "interval", "interval": 2}
        fast = node("QandC_ApplyCache").execute(watched, policy, 1, offload=offload).args[0]
        images.append(sample(fast).cpu())
        found["on" if offload else "off"] = sorted(devices)
    return {**found, "difference": host.relative(images[1], images[0])}


if __name__ == "__main__":
    main()
