"""Prompts as the encoders of a CLIP get them, and the outputs of an encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management as mm
import torch
from torch import Tensor

from ....qandc_core.calibration.statistics import merge_tokens
from .found import Encoder

Tokens = Any  # what ComfyUI's SDClipModel takes: lists of numbers and embeddings


def tokens_of(clip, encoders: Sequence[Encoder], prompts: Sequence[str], each: Callable) -> dict[str, list[Tokens]]:
    """Encoder's name -> its tokens of each prompt, after which `each` is called. They are encoded on the way, which
    loads the CLIP and sets its encoders as CLIP Text Encode does.
    """
    found: dict[str, list[Tokens]] = {encoder.name: [] for encoder in encoders}

    def noted(name: str) -> Callable[[Any, tuple], None]:
        return lambda _, args: found[name].append(args[0])

    handles = [encoder.model.register_forward_pre_hook(noted(encoder.name)) for encoder in encoders]
    try:
        for prompt in prompts:
            clip.encode_from_tokens(clip.tokenize(prompt))
            each()
    finally:
        for handle in handles:
            handle.remove()
    return found


class Answers:
    """Runs one encoder on tokens; `counted` tells the tokens of the present run that its attention does not mask."""

    def __init__(self, clip, encoder: Encoder):
        self.clip, self.encoder = clip, encoder
        self.mask: Tensor | None = None

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The encoder loaded, and its masks observed."""
        mm.load_models_gpu([self.clip.patcher])
        handle = self.encoder.network.register_forward_pre_hook(self.note_mask)
        try:
            yield
        finally:
            handle.remove()

    def note_mask(self, _: Any, args: tuple) -> None:
        mask = args[1] if len(args) > 1 else None
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def run(self, tokens: Tokens) -> Any:
        mm.throw_exception_if_processing_interrupted()
        with mm.cuda_device_context(self.clip.patcher.load_device):
            return self.encoder.model(tokens)

    def counted(self, x: Tensor) -> Tensor:
        """The rows (M, K) of x (texts, tokens, K) whose tokens are not masked."""
        if self.mask is None or x.shape[:-1] != self.mask.shape:
            return merge_tokens(x)
        return x[self.mask.to(x.device).bool()]

    def output(self, tokens: Tokens) -> Tensor:
        """The encoder's output on the CPU, with zeros for masked tokens: (texts, tokens, width), or the same of
        each of several layers.
        """
        z = self.run(tokens)[0].float()
        if self.mask is not None and z.shape[-2] == self.mask.shape[-1] and len(z) == len(self.mask):
            kept = self.mask.to(z.device).bool()
            z = torch.where(kept.view(len(z), *[1] * (z.dim() - 3), -1, 1), z, 0.0)
        return z.cpu()
