"""Error of a model with quantized layers: its predictions for held-out calls against those of the original."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from statistics import fmean

import comfy.model_management as mm
import torch
from torch import Tensor

from ....qandc_core.calibration.calls import ModelCall
from ....qandc_core.numerics import relative_error
from ....qandc_core.quantization.native import NativeLayer
from ....qandc_core.quantization.report import mean_error
from ....qandc_core.quantization.sensitivity import answering_as

FEW = 3  # calls that tell shares of the error


class HeldOutError:
    """Compares with the patcher, as it is, on these calls; `called` is told of every answer."""

    def __init__(self, patcher, calls: tuple[ModelCall, ...], called: Callable[[], None]):
        self.patcher, self.calls, self.called = patcher, calls, called

    def prepare(self) -> None:
        """Asks the model itself, which is otherwise done when it is first needed."""
        self.exact  # noqa: B018

    @cached_property
    def exact(self) -> list[Tensor]:
        return self.answers(self.patcher)

    def of_layers(self, layers: Mapping[str, NativeLayer], rough: bool = False) -> float:
        """The mean relative error where the model has these layers quantized and is as it is otherwise; rough on few
        of the calls.
        """
        chosen = self.few if rough else range(len(self.calls))
        exact = [self.exact[i] for i in chosen]
        with answering_as(self.patcher.model.diffusion_model, layers):
            return fmean(relative_errors(exact, self.answers(self.patcher, chosen)))

    @property
    def few(self) -> list[int]:
        """Calls for shares of the error, evenly among all, which lie at noise levels of a whole run."""
        count = min(FEW, len(self.calls))
        return [(2 * i + 1) * len(self.calls) // (2 * count) for i in range(count)]

    def of_model(self, quantized) -> tuple[float, float, int]:
        """Mean, standard error (NaN of one call) and number of the relative errors of a quantized patcher."""
        return mean_error(relative_errors(self.exact, self.answers(quantized)))

    @torch.inference_mode()
    def answers(self, patcher, chosen: Sequence[int] | None = None) -> list[Tensor]:
        mm.load_models_gpu([patcher])
        given = patcher.model_options["transformer_options"]
        patches = {key: given[key] for key in ("patches", "patches_replace") if key in given}
        found = []
        for call in self.calls if chosen is None else [self.calls[i] for i in chosen]:
            x, sigma = call.x.to(patcher.load_device), call.sigma.to(patcher.load_device)
            options = {**patches, "cond_or_uncond": [0], "sigmas": sigma, "sample_sigmas": sigma}
            options["uuids"] = [uuid.uuid4()]
            answer = patcher.model.apply_model(x, sigma, transformer_options=options, **call.conditions)
            found.append(answer.float().cpu())
            self.called()
        return found


def relative_errors(exact: list[Tensor], found: list[Tensor]) -> list[float]:
    """|D_q - D| / |D| of each call."""
    return [relative_error(b, a) for a, b in zip(exact, found)]
