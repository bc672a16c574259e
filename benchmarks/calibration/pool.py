"""A pool of calibration samples that is kept whole, so that many choices from it can be compared.

calibrate() samples its trajectories a second time instead and needs no memory for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qandc_core.caching.attach import cache_bypassed, feature_cache
from qandc_core.calibration.statistics import LayerStatistics, check_inputs_finite, merge_tokens, observed
from qandc_core.diffusion.process import ReverseProcess, SamplingConfig
from qandc_core.models.dit import DiT, check_open
from qandc_core.models.layers import named_linears


@dataclass(frozen=True)
class CandidatePool:
    """samples (N, C, H, W); steps (N,) step indices; timesteps (N,) training steps; labels (N,) class ids;
    computed (N,) whether the cache computes that step.
    """

    samples: Tensor
    steps: Tensor
    timesteps: Tensor
    labels: Tensor
    computed: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def features(self) -> Tensor:
        """x_t flattened: what the paper clusters."""
        return self.samples.flatten(1)

    def subset(self, indices: Tensor) -> CandidatePool:
        return CandidatePool(
            *(v[indices] for v in (self.samples, self.steps, self.timesteps, self.labels, self.computed))
        )


@torch.inference_mode()
def collect_pool(
    model: DiT,
    class_labels: Sequence[int] | Tensor,
    config: SamplingConfig,
    *,
    batch_size: int = 64,
    seed: int = 0,
    first_index: int = 0,
    callback: Callable[[int, int], None] | None = None,
) -> CandidatePool:
    """Every (x_t, t, class) of one trajectory for each label: N = labels x steps. Uses the cache that is attached."""
    check_open(model, "calibrate")
    labels, cache = torch.as_tensor(class_labels), feature_cache(model)
    samples, steps, classes, computed = [], [], [], []
    chunks = labels.split(batch_size)
    timesteps = torch.tensor(config.schedule().timesteps)
    try:
        for number, chunk in enumerate(chunks):
            process = ReverseProcess(model, chunk, config)
            at = first_index + number * batch_size
            source = process.noise_source(seed, range(at, at + len(chunk)))
            if cache is not None:
                cache.reset()
            x = source.draw().to(process.device)
            for i in range(len(process)):
                samples.append(x.cpu())
                steps.append(torch.full((len(chunk),), i))
                classes.append(chunk)
                x, _ = process.step(i, x, source.draw().to(process.device) if process.needs_noise(i) else None)
                computed.append(torch.full((len(chunk),), cache is None or cache.computed(i)))
                if callback is not None:
                    callback(number * len(process) + i, len(chunks) * len(process))
    finally:
        if cache is not None:
            cache.reset()
    index = torch.cat(steps)
    return CandidatePool(torch.cat(samples), index, timesteps[index], torch.cat(classes), torch.cat(computed))


def is_cached_layer(name: str, reuse: str = "branch") -> bool:
    """True for the layers that a reused step skips: those of attention and MLP; with reuse="block" all of a block."""
    return name.startswith("blocks.") and (reuse == "block" or ".attn." in name or ".mlp." in name)


@torch.inference_mode()
def collect_statistics(
    model: DiT,
    selected: CandidatePool,
    *,
    cfg_scale: float = 4.0,
    skip_patterns: Sequence[str] = (),
    hessians: bool = False,
    batch_size: int = 64,
) -> dict[str, LayerStatistics]:
    """Input statistics of every linear layer over the selected samples, both guidance branches.

    A layer inside a cached branch sees only the samples of steps that run it. Raises ValueError where none does, or
    on inputs that are not finite.
    """
    check_open(model, "calibrate")
    layers = list(named_linears(model, skip_patterns))
    if not layers:
        raise ValueError(f"No linear layer is left to observe with skip_patterns {list(skip_patterns)}.")
    cache = feature_cache(model)
    reuse = "branch" if cache is None else cache.reuse
    statistics = {name: LayerStatistics.empty(layer.in_features, hessians) for name, layer in layers}
    device, dtype = model.pos_embed.device, model.pos_embed.dtype
    for layer in statistics.values():
        layer.settle(device, sys.maxsize)

    def observe(name: str, x: Tensor) -> None:
        statistics[name].update(merge_tokens(x))

    for computed in (True, False):
        chosen = selected.subset((selected.computed == computed).nonzero().flatten())
        active = layers if computed else [(n, layer) for n, layer in layers if not is_cached_layer(n, reuse)]
        with cache_bypassed(model), observed(active, observe):
            for at in range(0, len(chosen), batch_size):
                x = chosen.samples[at : at + batch_size].to(device, dtype)
                t, y = (v[at : at + batch_size].to(device) for v in (chosen.timesteps, chosen.labels))
                model(x, t, y)
                if cfg_scale != 1:
                    model(x, t, torch.full_like(y, model.null_class))
    check_inputs_finite(statistics)
    for layer in statistics.values():
        layer.fetch()
    unseen = [name for name, s in statistics.items() if s.count == 0]
    if unseen:
        raise ValueError(
            f"No selected sample lies on a step that runs {unseen[0]} ({len(unseen)} layers in all); "
            "select more samples."
        )
    return statistics
