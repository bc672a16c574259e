"""Sampling whose state stays on the device: a program for a computed step and one for a reused, as CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..caching.policies import PolicyConfig
from ..caching.schedule import CacheConfig
from ..compensation.correction import VarianceCompensation
from ..diffusion.coefficients import forecast_weights, step_coefficients
from ..diffusion.guidance import guide, split_variance
from ..diffusion.process import ReverseProcess, SamplingConfig
from ..models.dit import DiT
from ..sampling.clock import CallTimes, span
from ..sampling.report import RunReport, peak_memory, reset_peak_memory
from .attention import fastest_attention
from .dit import FusedDiT

EVERY_STEP = CacheConfig(interval=1, mode="prediction")
ROWS_AT_ONCE = 512  # conditions whose modulations are computed in one product


class PlainPredictor:
    """A DiT as it is: baselines."""

    def __init__(self, loop: DeviceLoop):
        if loop.cache.mode != "prediction":
            raise ValueError("On the device a DiT reuses predictions only; make it a FusedDiT for other modes.")
        self.model, self.rows = loop.model, loop.rows
        self.timesteps = torch.tensor(loop.schedule.timesteps, device=loop.device)
        self.labels = torch.zeros_like(loop.rows)

    def prepare(self, labels: Tensor) -> None:
        self.labels.copy_(labels[self.rows])

    def attention(self, loop: DeviceLoop) -> AbstractContextManager[None]:
        return nullcontext()

    def __call__(self, x: Tensor, index: Tensor, reuse: bool) -> Tensor:
        return self.model(x, self.timesteps.index_select(0, index).expand(len(x)), self.labels)


class FusedPredictor:
    """A FusedDiT with the modulations of all steps at hand: weights of a third of the model are read once for a run."""

    def __init__(self, loop: DeviceLoop):
        assert isinstance(loop.model, FusedDiT)
        config, needed = loop.model.config, loop.needed
        self.model, self.rows = loop.model, loop.rows
        self.timesteps = torch.tensor([loop.schedule.timesteps[i] for i in needed], device=loop.device)
        slots = torch.zeros(len(loop.schedule), dtype=torch.long)
        slots[needed] = torch.arange(len(needed))
        self.slots = slots.to(loop.device)
        conditions = int(loop.rows.max()) + 1
        tensor: dict[str, Any] = {"dtype": loop.dtype, "device": loop.device}
        self.table = torch.zeros(len(needed), conditions, 6 * config.depth + 2, config.hidden_size, **tensor)
        tokens = (len(loop.rows), (config.input_size // config.patch_size) ** 2, config.hidden_size)
        shapes = {"branch": (config.depth, 2, *tokens), "block": tokens}
        mode = loop.cache.mode
        self.kept = torch.zeros(shapes[mode], **tensor) if mode in shapes else None

    def prepare(self, labels: Tensor) -> None:
        at_once = max(1, ROWS_AT_ONCE // len(labels))
        for timesteps, table in zip(self.timesteps.split(at_once), self.table.split(at_once)):
            found = self.model.modulations(timesteps.repeat_interleave(len(labels)), labels.repeat(len(timesteps)))
            table.copy_(found.view_as(table))

    def attention(self, loop: DeviceLoop) -> AbstractContextManager[None]:
        config = loop.model.config
        tokens = (config.input_size // config.patch_size) ** 2
        width = config.hidden_size // config.num_heads
        return fastest_attention(len(loop.rows), config.num_heads, tokens, width, self.table)

    def __call__(self, x: Tensor, index: Tensor, reuse: bool) -> Tensor:
        modulations = self.table.index_select(0, self.slots.index_select(0, index))[0]
        return self.model(x, modulations.index_select(0, self.rows), self.kept, reuse)


def predictor_of(loop: DeviceLoop) -> PlainPredictor | FusedPredictor:
    return FusedPredictor(loop) if isinstance(loop.model, FusedDiT) else PlainPredictor(loop)


class DeviceLoop:
    """A run of `images` images with fixed settings; `run` may be called again with other classes and noise.

    With graphs (None: on CUDA) the two programs are captured once and replayed; nothing waits for the device between
    steps. Raises ValueError on settings that need the host in each step.
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
        self.predictor = predictor_of(self)
        self.allocate(images)
        self.programs: dict[bool, Callable[[], Any]] = {}
        # Nothing of a step outlives it but the buffers above, so both graphs may use the same memory.
        self.pool = torch.cuda.graph_pool_handle() if self.graphs else None

    @property
    def needed(self) -> list[int]:
        """Steps that call the model."""
        return [i for i, computes in enumerate(self.computed) if computes or self.cache.mode != "prediction"]

    def allocate(self, images: int) -> None:
        config, steps = self.model.config, len(self.schedule)
        shape = (images, config.in_channels, config.input_size, config.input_size)
        zeros = lambda *sizes: torch.zeros(*sizes, device=self.device)  # noqa: E731
        self.index = torch.zeros(1, dtype=torch.long, device=self.device)
        self.x, self.denoised, self.older = zeros(shape), zeros(shape), zeros(shape)
        self.noise = zeros(steps if self.config.sampler == "ddpm" else 0, *shape)
        self.factor, self.mean = (zeros(steps if self.compensated else 0, config.in_channels) for _ in range(2))
        rows = [step_coefficients(self.schedule, self.config.sampler, i) for i in range(steps)]
        weights = forecast_weights(self.computed, self.cache.order)
        table = [[*vars(row).values(), weight] for row, weight in zip(rows, weights)]
        self.table = torch.tensor(table, dtype=torch.float32, device=self.device)

    @property
    def cache_bytes(self) -> int:
        """Of what a reused step reads."""
        if all(self.computed):
            return 0
        kept = getattr(self.predictor, "kept", None)
        return self.denoised.nbytes * (1 + self.cache.order) if kept is None else kept.nbytes

    @torch.inference_mode()
    def step(self, reuse: bool) -> None:
        """One step in place, at the number that `index` holds."""
        signal, noise_part, keep, denoise, fresh, weight = self.table.index_select(0, self.index)[0].unbind()
        x = self.x
        if self.compensated:
            x = x + self.at(self.factor - 1) * (x - self.at(self.mean))
        if reuse and self.cache.mode == "prediction":
            x0 = torch.lerp(self.older, self.denoised, weight) if self.cache.order else self.denoised
        else:
            with self.predictor.attention(self):
                x0 = self.predicted(x, signal, noise_part, reuse)
            self.older.copy_(self.denoised)
            self.denoised.copy_(x0)
        following = keep * x + denoise * x0
        if len(self.noise):
            following = following + fresh * self.noise.index_select(0, self.index)[0]
        self.x.copy_(following)
        self.index.add_(1)

    def at(self, values: Tensor) -> Tensor:
        """This step's row of a table (S, C), to broadcast over images."""
        return values.index_select(0, self.index)[0].view(1, -1, 1, 1)

    def predicted(self, x: Tensor, signal: Tensor, noise_part: Tensor, reuse: bool) -> Tensor:
        """The guided clean image of x."""
        config, half = self.config, x.to(self.dtype)
        if config.cfg_scale == 1:
            out, _ = split_variance(self.predictor(half, self.index, reuse), x.shape[1])
        else:
            conditional, unconditional = self.predictor(torch.cat([half, half]), self.index, reuse).chunk(2)
            out, _ = guide(conditional, unconditional, x.shape[1], config.cfg_scale, config.guidance_channels)
        out = out.float()
        return out if self.model.config.prediction == "sample" else (x - noise_part * out) / signal

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
        for kept in (self.denoised, self.older):
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

    def program(self, reuse: bool) -> Callable[[], Any]:
        if reuse not in self.programs:
            self.programs[reuse] = self.captured(reuse) if self.graphs else partial(self.step, reuse)
        return self.programs[reuse]

    @torch.inference_mode()
    def captured(self, reuse: bool) -> Callable[[], None]:
        """The step as a CUDA graph. Warming up moves the run's state, which is put back."""
        state = [self.x, self.index, self.denoised, self.older]
        kept = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # the first call compiles and tunes kernels
                self.index.copy_(kept[1])
                self.step(reuse)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.step(reuse)
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
        programs = [self.program(not computes) for computes in self.computed]
        self.started = time.perf_counter()
        marks = [self.mark()]
        self.prepare(labels, noise, compensation)
        for i, program in enumerate(programs):
            program()
            marks.append(self.mark())
            if after_step is not None:
                after_step(i, self)
        return [span(begun, ended) for begun, ended in zip(marks, marks[1:])]

    def mark(self) -> Any:
        moment = CallTimes().mark(self.device)
        return time.perf_counter() if moment is None else moment


def device_loop(
    model: FusedDiT, images: int, config: SamplingConfig, compensated: bool, cache: CacheConfig | PolicyConfig | None
) -> DeviceLoop:
    """The loop of the model's latest run where it fits this one; its graphs and buffers are the costly part."""
    if cache is not None:
        cache = cache.for_run(len(config.schedule()), model.reuse_cost(cache.mode))
    key = images, config, compensated, cache, model.pos_embed.device
    if key not in model.loops:
        model.loops = {key: DeviceLoop(model, images, config, cache, compensated)}
    return model.loops[key]


def sample_on_device(
    process: ReverseProcess,
    noise: Iterable[Tensor],
    compensation: VarianceCompensation | None,
    after_step: Callable[[int, DeviceLoop], None] | None = None,
) -> tuple[Tensor, RunReport]:
    """A whole run of a FusedDiT; after_step(index, loop) follows each step."""
    model, config = process.model, process.config
    assert isinstance(model, FusedDiT)
    reset_peak_memory(process.device)
    loop = device_loop(model, len(process.labels), config, compensation is not None, model.cache)

    seconds = loop.run(process.labels, noise, compensation, after_step)
    report = RunReport(config.sampler, len(process), len(process.labels), config.cfg_scale, str(process.device))
    report.seconds, report.computed, report.cache_bytes = seconds, list(loop.computed), loop.cache_bytes
    report.peak_memory = peak_memory(process.device)
    return loop.x.clone(), report
