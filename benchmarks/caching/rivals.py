"""The caches of other papers, as their papers and code say, for models whose blocks stand in one list.

Each is a plan (which steps compute), a place (what is kept) and a forecaster (what stands for it on the other steps):

| method | plan | place | forecaster |
|---|---|---|---|
| FORA (arXiv 2407.01425) | every N-th step | attention and MLP of each block | the last one |
| TaylorSeer (arXiv 2503.06923) | two steps, then every N-th | the same | Taylor's series of finite differences |
| HiCache (arXiv 2508.16984) | the same | the same | Hermite's polynomials in place of the powers |
| Spectrum (arXiv 2603.01623) | five steps, then windows that grow | output of the last block | Chebyshev ridge regression on all computed steps, blended with the line through the last two |
| MagCache (arXiv 2506.09045) | while the magnitude of the residual, calibrated on one run, drifts little | output of the last block less input of the first | the last one |

The sampler must call the model once a step, with every condition in one batch.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# --- forecasters: what a feature is at a step that was not computed ---------------------------------------------------


class Forecaster(Protocol):
    def update(self, step: int, feature: Tensor) -> None: ...
    def predict(self, step: int) -> Tensor: ...


class Hold:
    """The last computed feature."""

    def update(self, step: int, feature: Tensor) -> None:
        self.feature = feature

    def predict(self, step: int) -> Tensor:
        return self.feature


class Taylor:
    """TaylorSeer, eq. 6: F(s + x) = sum_i D_i x^i / i!, where D_i are finite differences over the computed steps.

    As in its code, a difference of order i + 1 is divided by the last gap, whatever the gaps before it.
    """

    def __init__(self, order: int):
        self.order, self.step = order, 0
        self.differences: list[Tensor] = []

    def update(self, step: int, feature: Tensor) -> None:
        found = [feature]
        for before in self.differences[: self.order]:
            found.append((found[-1] - before) / (step - self.step))
        self.step, self.differences = step, found

    def predict(self, step: int) -> Tensor:
        x = step - self.step
        return sum((self.basis(i, x) / math.factorial(i)) * d for i, d in enumerate(self.differences))  # type: ignore

    def basis(self, order: int, x: float) -> float:
        return float(x**order)


class Hermite(Taylor):
    """HiCache: the powers x^i of Taylor are scaled Hermite polynomials (physicists'), sigma^i H_i(sigma x)."""

    def __init__(self, order: int, sigma: float = 0.5):
        super().__init__(order)
        self.sigma = sigma

    def basis(self, order: int, x: float) -> float:
        before, now = 0.0, 1.0
        for i in range(order):
            before, now = now, 2 * self.sigma * x * now - 2 * i * before
        return self.sigma**order * now


class Chebyshev:
    """Spectrum: ridge regression of all computed features on T_0..T_degree of the run's fraction in [-1, 1], mixed with
    the line through the last two: w regression + (1 - w) line."""

    def __init__(self, total: int, degree: int = 4, ridge: float = 0.1, w: float = 0.5):
        self.total, self.degree, self.ridge, self.w = total, degree, ridge, w
        self.steps: list[int] = []
        self.features: list[Tensor] = []

    def update(self, step: int, feature: Tensor) -> None:
        self.steps.append(step)
        self.features.append(feature)

    def design(self, steps: Sequence[int]) -> Tensor:
        tau = 2 * torch.tensor(steps, dtype=torch.float64) / self.total - 1
        return torch.cos(torch.arange(self.degree + 1) * torch.acos(tau)[:, None])

    def weights(self, step: int) -> Tensor:
        """The share of each computed feature in the forecast: it is linear in them."""
        X = self.design(self.steps)
        gram = X.T @ X + self.ridge * torch.eye(X.shape[1], dtype=X.dtype)
        weights = self.w * (self.design([step]) @ torch.linalg.solve(gram, X.T))[0]
        if len(self.steps) == 1:
            weights[-1] += 1 - self.w
        else:
            x = (step - self.steps[-1]) / (self.steps[-1] - self.steps[-2])
            weights[-1] += (1 - self.w) * (1 + x)
            weights[-2] -= (1 - self.w) * x
        return weights

    def predict(self, step: int) -> Tensor:
        weights = self.weights(step).tolist()
        return sum(weight * feature for weight, feature in zip(weights, self.features))  # type: ignore


class Magnitudes(Hold):
    """Notes how large the feature is at each step, in tokens' mean, against the step before: MagCache's calibration."""

    def __init__(self) -> None:
        self.ratios: list[float] = []

    def update(self, step: int, feature: Tensor) -> None:
        ratio = feature.norm(dim=-1) / self.feature.norm(dim=-1) if self.ratios else torch.ones(1)
        self.ratios.append(float(ratio.mean()))
        super().update(step, feature)


# --- plans: which steps compute ---------------------------------------------------------------------------------------


def every(steps: int, interval: int, first: int = 1) -> list[bool]:
    """The `first` steps and, after them, the last of every `interval`."""
    return [step < first or (step - first + 1) % interval == 0 for step in range(steps)]


def windows(steps: int, warmup: int = 5, window: float = 2, growth: float = 0.75) -> list[bool]:
    """Spectrum: one step of each window computes, the last; the windows grow by `growth` a turn."""
    plan, reused = [True] * min(warmup, steps), 0
    for _ in range(steps - warmup):
        computes = (reused + 1) % math.floor(window) == 0
        window, reused = (window + growth, 0) if computes else (window, reused + 1)
        plan.append(computes)
    return plan


def magnitudes(steps: int, ratios: Sequence[float], threshold: float, most: int, kept: float = 0.2) -> list[bool]:
    """MagCache: reuses while the products of the ratios |r_t| / |r_t-1| since the last computed step, summed up by how
    far they are from 1, stay within `threshold`, at most `most` in a row; the first part `kept` of the run computes."""
    plan, product, error, row = [], 1.0, 0.0, 0
    for step in range(steps):
        if step >= int(kept * steps + 0.5):
            product, row = product * ratios[step], row + 1
            error += abs(1 - product)
            if error <= threshold and row <= most:
                plan.append(False)
                continue
            product, error, row = 1.0, 0.0, 0
        plan.append(True)
    return plan


# --- places -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sites:
    """A network, its blocks in order, and the attention and MLP of each."""

    model: nn.Module
    blocks: Sequence[nn.Module]
    branches: Sequence[nn.Module]


def sites(model: nn.Module) -> Sites:
    """Of the engine's DiT and of ComfyUI's NextDiT."""
    blocks: Any = getattr(model, "blocks", None) or model.layers
    names = ("attn", "mlp") if hasattr(blocks[0], "attn") else ("attention", "feed_forward")
    return Sites(model, list(blocks), [getattr(block, name) for block in blocks for name in names])


@dataclass
class Rival:
    """`place` is "branches", "last" (output of the last block) or "residual" (less the input of the first)."""

    plan: Sequence[bool]
    place: str
    forecaster: Callable[[], Forecaster]
    calls: int = field(default=0, init=False)  # computed, of the last run

    @contextmanager
    def applied(self, where: Sites) -> Iterator[None]:
        """One run under this cache: every forward of the model is a step."""
        self.calls, run = 0, _Run(self, where.blocks[0])
        modules = where.branches if self.place == "branches" else where.blocks[-1:]
        replaced = {module: run.kept(module.forward) for module in modules}
        if self.place != "branches":
            replaced |= {block: run.passed(block.forward) for block in where.blocks[:-1]}
        handle = where.model.register_forward_pre_hook(run.next_step)
        try:
            for module, forward in replaced.items():
                module.forward = forward
            yield
        finally:
            handle.remove()
            for module in replaced:
                module.__dict__.pop("forward", None)


class _Run:
    def __init__(self, rival: Rival, first: nn.Module):
        self.rival, self.first, self.step = rival, first, -1

    @property
    def computes(self) -> bool:
        return self.rival.plan[self.step]

    def next_step(self, *_: Any) -> None:
        self.step += 1
        self.rival.calls += self.computes

    def kept(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A forward whose result is kept and forecast; where residuals are, less its input on the first block."""
        forecaster = self.rival.forecaster()
        residual = self.rival.place == "residual"

        def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not self.computes:
                return x + forecaster.predict(self.step) if residual else forecaster.predict(self.step)
            out = forward(x, *args, **kwargs)
            forecaster.update(self.step, out - self.entered if residual else out)
            return out

        return call

    def passed(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A block before the last: it hands on what it got where the step is reused."""

        def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if getattr(forward, "__self__", None) is self.first:
                self.entered = x
            return forward(x, *args, **kwargs) if self.computes else x

        return call
