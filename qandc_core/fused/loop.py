"""Sampling whose state stays on the device.

A step of a small DiT is hundreds of kernels of a few microseconds each, and Python takes longer to queue them than the
GPU to run them. So nothing here depends on what the host computes between steps: the sample, the number of the step,
the noise of all steps, the coefficients of the sampler and the modulations of every timestep lie in buffers of the
device, and a step looks its own row up by an index that it increments itself. A step is then always the same list of
kernels on the same addresses, of which there are two kinds, one that computes and one that reuses. Each is recorded
once as a CUDA graph and replayed with a single launch.

What it costs: buffers for the noise and the modulations of a whole run (DiT-XL/2, 50 steps, batch 8 with guidance, half
precision: 0.18 GB of modulations), a fixed batch size and image size, and settings that need no decision of the host.
A graph knows addresses, not tensors: `run` compares the addresses of all weights with those that were recorded and
records anew where they differ, because a replay would read memory that belongs to someone else by now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..caching.attach import PolicyConfig
from ..caching.forecast import forecast_rows
from ..caching.schedule import CacheConfig
from ..compensation.correction import VarianceCompensation, compensate
from ..diffusion.guidance import guide, split_variance
from ..diffusion.process import NoiseSource, ReverseProcess, SamplingConfig
from ..diffusion.steps import StepCoefficients, step_coefficients
from ..sampling.clock import StepClock
from ..sampling.generate import StepInfo, progress_bar
from ..sampling.report import RunReport, peak_memory, reset_peak_memory
from .predictor import FusedPredictor

if TYPE_CHECKING:
    from ..models.dit import DiT
    from .dit import FusedDiT

EVERY_STEP = CacheConfig(interval=1, reuse="prediction")


def addresses(model: nn.Module) -> tuple:
    """Address and form of every weight, which a captured graph relies on."""
    return tuple((t.data_ptr(), t.dtype, t.stride()) for t in chain(model.parameters(), model.buffers()))


class DeviceLoop:
    """A run of `images` images with fixed settings; `run` may be called again with other classes and noise.

    With graphs (None: on CUDA) the two programs are captured once and replayed; nothing waits for the device between
    steps. Another model than a FusedDiT brings its own `predictor`. Raises ValueError on settings that need the host
    in each step.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: DiT | FusedDiT,
        images: int,
        config: SamplingConfig,
        cache: CacheConfig | None = None,
        compensated: bool = False,
        graphs: bool | None = None,
        predictor: Callable[[DeviceLoop], Any] = FusedPredictor,
    ):
        if config.variance != "fixed_small" or not config.batched_guidance:
            raise ValueError("A FusedDiT samples with variance='fixed_small' and batched_guidance=True only.")
        self.model, self.config, self.compensated = model, config, compensated
        self.schedule = config.schedule()
        self.cache = cache or EVERY_STEP
        if all(map(self.cache.computes, range(len(self.schedule)))):
            self.cache = EVERY_STEP
        self.device, self.dtype = model.pos_embed.device, model.pos_embed.dtype
        self.graphs = self.device.type == "cuda" if graphs is None else graphs
        self.computed = [self.cache.computes(i) for i in range(len(self.schedule))]
        self.rows = torch.arange(images, device=self.device)
        if config.cfg_scale != 1:  # all images share the unconditional row
            self.rows = torch.cat([self.rows, torch.full_like(self.rows, images)])
        self.predictor = predictor(self)
        self.allocate(images)
        self.programs: dict[bool, Callable[[], Any]] = {}
        self.recorded = addresses(model)
        # Nothing of a step outlives it but the buffers above, so both graphs may use the same memory.
        self.pool = torch.cuda.graph_pool_handle() if self.graphs else None

    @property
    def needed(self) -> list[int]:
        """Steps that call the model."""
        return [i for i, computes in enumerate(self.computed) if computes or self.cache.reuse != "prediction"]

    def allocate(self, images: int) -> None:
        config, steps = self.model.config, len(self.schedule)
        shape = (images, *config.shape)
        zeros = lambda *sizes: torch.zeros(*sizes, device=self.device)  # noqa: E731
        self.index = torch.zeros(1, dtype=torch.long, device=self.device)
        self.x, self.denoised, self.older = zeros(shape), zeros(shape), zeros(shape)
        self.oldest = zeros(shape if self.cache.order == 2 else (0, *shape[1:]))
        self.noise = zeros(steps if self.config.sampler == "ddpm" else 0, *shape)
        self.factor, self.mean = (zeros(steps if self.compensated else 0, config.in_channels) for _ in range(2))
        rows = [step_coefficients(self.schedule, self.config.sampler, i) for i in range(steps)]
        forecasts = forecast_rows(self.computed, self.cache.order)
        table = [[*vars(row).values(), *forecast] for row, forecast in zip(rows, forecasts)]
        self.table = torch.tensor(table, dtype=torch.float32, device=self.device)

    @property
    def cache_bytes(self) -> int:
        """Size of the features that a reused step reads."""
        if all(self.computed):
            return 0
        kept = getattr(self.predictor, "kept", None)
        return self.denoised.nbytes * (1 + self.cache.order) if kept is None else kept.nbytes

    @torch.inference_mode()
    def step(self, reused: bool) -> None:
        """One step in place, at the number that `index` holds."""
        row = self.table.index_select(0, self.index)[0].unbind()
        coefficients, forecast = StepCoefficients(*row[:-3]), row[-3:]
        x = compensate(self.x, self.at(self.mean), self.at(self.factor)) if self.compensated else self.x
        if reused and self.cache.reuse == "prediction":
            x0 = self.forecast(*forecast)
        else:
            with self.predictor.attention(self):
                x0 = self.predicted(x, coefficients, reused)
            if len(self.oldest):
                self.oldest.copy_(self.older)
            self.older.copy_(self.denoised)
            self.denoised.copy_(x0)
        self.x.copy_(coefficients.advance(x, x0, self.at(self.noise) if len(self.noise) else None))
        self.index.add_(1)

    def forecast(self, latest: Tensor, before: Tensor, first: Tensor) -> Tensor:
        """The prediction of a reused step, by the coefficients of the latest computed ones."""
        if self.cache.order == 0:
            return self.denoised
        if self.cache.order == 1:
            return torch.lerp(self.older, self.denoised, latest)
        return latest * self.denoised + before * self.older + first * self.oldest

    def at(self, values: Tensor) -> Tensor:
        """This step's row of a table (S, ...)."""
        return values.index_select(0, self.index)[0]

    def predicted(self, x: Tensor, coefficients: StepCoefficients, reused: bool) -> Tensor:
        """The guided clean image of x."""
        config, half = self.config, x.to(self.dtype)
        if config.cfg_scale == 1:
            out, _ = split_variance(self.predictor(half, self.index, reused), x.shape[1])
        else:
            conditional, unconditional = self.predictor(torch.cat([half, half]), self.index, reused).chunk(2)
            out, _ = guide(conditional, unconditional, x.shape[1], config.cfg_scale, config.guidance_channels)
        out = out.float()
        return out if self.model.config.prediction == "sample" else coefficients.clean_image(x, out)

    @torch.inference_mode()
    def prepare(self, labels: Tensor, noise: Iterable[Tensor], compensation: VarianceCompensation | None) -> None:
        """Everything that a run's steps read. Raises ValueError on noise of another size."""
        start, *fresh = noise
        if start.shape != self.x.shape:
            raise ValueError(f"This model samples {tuple(self.x.shape)} here, but the noise is {tuple(start.shape)}.")
        if self.config.cfg_scale != 1:
            labels = torch.cat([labels, labels.new_full((1,), self.model.null_class)])
        self.predictor.prepare(labels)
        self.x.copy_(start)
        self.rewind()
        for kept in (self.denoised, self.older, self.oldest):
            kept.zero_()  # what a broken run left would spread
        for i, drawn in enumerate(fresh):
            self.noise[i].copy_(drawn)
        if compensation is not None:
            found = [compensation.find(sigma) for sigma in self.schedule.sigmas[:-1]]
            self.factor.copy_(compensation.factor[found])
            self.mean.copy_(compensation.mean[found])

    @torch.inference_mode()
    def rewind(self) -> None:
        """The next step is the first."""
        self.index.zero_()

    def program(self, reused: bool) -> Callable[[], Any]:
        if reused not in self.programs:
            self.programs[reused] = self.captured(reused) if self.graphs else partial(self.step, reused)
        return self.programs[reused]

    @torch.inference_mode()
    def captured(self, reused: bool) -> Callable[[], None]:
        """The step as a CUDA graph. Warming up moves the run's state, which is put back."""
        state = [self.x, self.index, self.denoised, self.older, self.oldest]
        kept = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # the first call compiles and tunes kernels
                self.rewind()  # a run that is over left the index beyond the last step
                self.step(reused)
        self.rewind()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.step(reused)
        for tensor, value in zip(state, kept):
            tensor.copy_(value)
        return graph.replay

    def run(
        self,
        labels: Tensor,
        noise: Iterable[Tensor],
        compensation: VarianceCompensation | None = None,
        after_step: Callable[[int, DeviceLoop], None] | None = None,
    ) -> list[float]:
        """Seconds of each step, the first with what all need; the images are in `x`.

        `noise` is the start and, for ddpm, each step's. The first run also captures, which is not counted.
        """
        self.forget_moved_weights()
        programs = [self.program(not computes) for computes in self.computed]
        self.clock = StepClock(self.device)
        self.prepare(labels, noise, compensation)
        for i, program in enumerate(programs):
            program()
            self.clock.end()
            if after_step is not None:
                after_step(i, self)
                self.clock.begin()
        return self.clock.seconds()

    def forget_moved_weights(self) -> None:
        """Drops graphs of weights that lie elsewhere by now. Raises ValueError where they left the device."""
        if self.model.pos_embed.device != self.device or self.model.pos_embed.dtype != self.dtype:
            raise ValueError(f"The model is no longer on {self.device} in {self.dtype}; make a new loop.")
        found = addresses(self.model)
        if found != self.recorded:
            self.programs.clear()
            self.recorded = found
            self.pool = torch.cuda.graph_pool_handle() if self.graphs else None


def device_loop(
    model: FusedDiT, images: int, config: SamplingConfig, compensated: bool, policy: PolicyConfig | None
) -> DeviceLoop:
    """The loop of the model's latest run where it fits this one; its graphs and buffers are the costly part."""
    cache = None
    if policy is not None:
        cache = policy.for_run(len(config.schedule()), model.reuse_cost(policy.reuse), config.sampler)
        if cache.reuse != "prediction":
            cache = replace(cache, order=0)  # a preset chooses its order late, and features are not extrapolated here
    key = images, config, compensated, cache, model.pos_embed.device
    if key not in model.loops:
        model.loops = {key: DeviceLoop(model, images, config, cache, compensated)}
    return model.loops[key]


def generate_on_device(
    model: FusedDiT,
    process: ReverseProcess,
    source: NoiseSource,
    compensation: VarianceCompensation | None,
    callback: Callable[[StepInfo], None] | None,
    progress: bool,
) -> tuple[Tensor, RunReport]:
    """A run of a FusedDiT as generate() has it; a callback or a progress bar makes the host wait for every step."""
    bar, config = progress_bar(range(len(process)), progress), process.config

    def after_step(i: int, loop: DeviceLoop) -> None:
        seconds = loop.clock.latest
        bar.update()
        if callback is not None:
            x, denoised = loop.x.clone(), loop.denoised.clone()
            callback(StepInfo(i, process.schedule.timesteps[i], x, denoised, loop.computed[i], seconds))

    reset_peak_memory(process.device)
    loop = device_loop(model, len(process.labels), config, compensation is not None, model.cache)
    noise = (source.draw() for _ in range(1 + sum(map(process.needs_noise, range(len(process))))))
    with bar:
        watched = callback is not None or progress
        seconds = loop.run(process.labels, noise, compensation, after_step if watched else None)
    report = RunReport(config.sampler, len(process), len(process.labels), config.cfg_scale, str(process.device))
    report.seconds, report.computed, report.cache_bytes = seconds, list(loop.computed), loop.cache_bytes
    report.peak_memory = peak_memory(process.device)
    return loop.x.clone(), report
