"""Locates the calls of a loop that says nothing: which step and whose features a call of a bare model belongs to.

A pipeline of diffusers calls its transformer and tells no one when a run begins, ends, or was cancelled. What a call
brings along does: the timestep falls within a run; its conditions are those of the features that it may use; and its
sample follows from earlier samples and outputs (`trajectory`), which the noise that another run starts from does not.
A call that does not provably go on begins a new run, and computes.

So guidance may come in one batch or in several calls, several samples may be on their way in turns, in any order, and a
Heun corrector may call twice at a timestep. Of stochastic schedulers a part of the next sample is known, at the first
steps of very few (LCM) too little: there calls compute. It costs the one host wait that the timestep takes.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .identity import signature
from .trajectory import STEPS, probe_positions, residual

EXPLAINED = 0.1  # share of a sample's square that earlier ones must explain; of independent noise they explain 0.02
EXACT, INEXACT = 0.9999, 0.9  # explained by a scheduler without noise, and too little for one that has shown to be such
SAMPLES = ("x", "hidden_states", "sample")
TIMESTEPS = ("timestep", "timesteps", "t")
CONDITION_VALUES = 64  # of each tensor


@lru_cache(maxsize=64)
def parameter_names(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names."""
    return dict(zip(parameter_names(cast(Any, type(module))), args)) | kwargs


def first_of(names: Sequence[str], found: dict[str, Any]) -> Any:
    return next((found[name] for name in names if name in found), None)


@dataclass
class ModelInput:
    """One call: its sample, its timestep, and the tensors and other values that make its condition."""

    x: Tensor
    timestep: Tensor
    tensors: list[Tensor]
    rest: Hashable

    @classmethod
    def of(cls, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> ModelInput:
        """Raises ValueError where the module takes no sample or no timestep."""
        found = arguments(module, args, kwargs)
        x, timestep = first_of(SAMPLES, found), first_of(TIMESTEPS, found)
        if not isinstance(x, Tensor) or timestep is None:
            raise ValueError(
                f"{type(module).__name__} was called without a sample or a timestep, which its cache needs."
            )
        # A ControlNet's residuals are new at every step and belong to no condition.
        others = {n: v for n, v in found.items() if n not in (*SAMPLES, *TIMESTEPS) and "controlnet" not in n}
        tensors = list(tensors_in(others))
        return cls(x, torch.as_tensor(timestep), tensors, signature(without_tensors(others)))

    def condition_values(self) -> list[Tensor]:
        return [probe(tensor, CONDITION_VALUES).to(self.x.device) for tensor in self.tensors if tensor.numel()]


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def without_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: without_tensors(item) for key, item in value.items()}
    return [without_tensors(item) for item in value] if isinstance(value, (list, tuple)) else value


def probe(tensor: Tensor, points: int) -> Tensor:
    positions = probe_positions(tensor.numel(), points).to(tensor.device)
    return tensor.detach().reshape(-1)[positions].float()


def differences(x: Tensor) -> Tensor:
    """Between neighbours: images are smooth and noise is not, so that two images alike in their colours differ here."""
    flat = x.detach().reshape(-1)
    at = probe_positions(max(flat.numel() - 1, 1)).to(x.device)
    return flat[(at + 1) % flat.numel()].float() - flat[at].float()


def seen_of(x: Tensor, out: Tensor | None) -> list[Tensor]:
    """Values of a sample and of what the model made of it, all at the same places.

    Of a batch for guidance, both halves go into both halves of the next sample. Channels of one that the other lacks
    (a learned variance, an image beside the noise) are left out.
    """
    x, out = alike(x, out)
    found = [differences(x)]
    if out is not None:
        found.append(differences(out))
        if len(out) % 2 == 0:
            found += [differences(torch.cat([half, half])) for half in out.chunk(2)]
    return found


def alike(x: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if out is None or out.ndim != x.ndim or x.ndim < 3 or out.shape[0] != x.shape[0] or out.shape[2:] != x.shape[2:]:
        return x, None
    channels = min(x.shape[1], out.shape[1])
    return x[:, :channels], out[:, :channels]


def output_tensor(out: Any) -> Tensor | None:
    if isinstance(out, Tensor):
        return out
    first = out[0] if isinstance(out, (tuple, list)) or hasattr(out, "sample") else None
    return first if isinstance(first, Tensor) else None


@dataclass
class Track:
    """One sample on its way: its values now, and those of the last evaluations with their outputs."""

    number: int
    sample: np.ndarray
    vectors: list[list[np.ndarray]] = field(default_factory=list)
    evaluation: int = 0  # at this timestep
    calls: Counter[Hashable] = field(default_factory=Counter)  # by condition, at this evaluation

    def explains(self, sample: np.ndarray) -> float:
        """The share of the sample's square that lies in the span of what is known, allowing for chance."""
        if np.array_equal(sample, self.sample):
            return 1.0
        total = float(np.square(sample).sum())
        basis = [vector for step in self.vectors for vector in step if len(vector) == len(sample)]
        freedom = len(sample) - len(basis)
        if not total > 0 or freedom < len(basis) + 8 or not all(np.isfinite(v).all() for v in (sample, *basis)):
            return 0.0
        left = float(np.square(residual(sample, basis)).sum()) / total
        return 1 - left * len(sample) / freedom

    def next(self, sample: np.ndarray, evaluation: int) -> Track:
        return Track(self.number, sample, self.vectors[1 - STEPS :], evaluation)


@dataclass
class CallLocator:
    """Follows the samples of one loop. `locate` answers for each call: what it begins, and the key of its features."""

    shape: tuple[int, ...] = ()
    timestep: float = float("inf")
    first: bool = True  # the present step is the first of its run
    now: list[Track] = field(default_factory=list)
    before: list[Track] = field(default_factory=list)
    exact: bool = False  # the scheduler has shown to add no noise
    number: int = 0
    current: Track | None = None
    waiting: list[Tensor] = field(default_factory=list)
    leading: int = 0  # channels of the sample that the model predicts; 0: not known

    def locate(self, call: ModelInput) -> tuple[bool, bool, Hashable]:
        """Does a new run begin; does a new step begin; and the key of the features that the call may use."""
        timestep, sample, condition = self.read(call)
        shape = tuple(call.x.shape)
        known = bool(self.now) and shape == self.shape and timestep <= self.timestep and len(sample) > 0
        track, step = None, timestep != self.timestep
        if known and step:
            track = self.follow(sample, self.now)
            if track is not None:
                self.before, self.now, self.first = self.now, [track], False
        elif known:
            track = self.again(sample)
        started = track is None
        if track is None:
            track = self.start(sample)
        self.shape, self.timestep, self.current = shape, timestep, track
        turn = track.calls[condition]
        track.calls[condition] += 1
        return started, started or step, (track.number, track.evaluation, condition, turn)

    def read(self, call: ModelInput) -> tuple[float, np.ndarray, Hashable]:
        """Timestep, values of the sample and the condition, in one transfer with what the last call left."""
        conditions = call.condition_values()
        channels = self.channels(call.x)
        sample = [differences(channels)] if self.current is not None else []
        parts = [call.timestep.reshape(-1).float().max().reshape(1).to(call.x.device), *sample, *conditions]
        parts = [*parts, *(part.to(call.x.device) for part in self.waiting)]
        host = torch.cat(parts).cpu().double().split([len(part) for part in parts])
        values = [part.numpy() for part in host]
        first = 1 + len(sample)
        kept = values[first + len(conditions) :]
        if kept and self.current is not None:
            self.current.sample = kept[0]
            self.current.vectors.append(kept)
        self.waiting = []
        bytes_of = tuple(part.tobytes() for part in values[first : first + len(conditions)])
        return float(values[0][0]), values[1] if sample else np.zeros(0), (call.rest, bytes_of)

    def channels(self, x: Tensor) -> Tensor:
        """The part of a sample that the model predicts."""
        return x[:, : self.leading] if self.leading else x

    def again(self, sample: np.ndarray) -> Track | None:
        """A further call at the present timestep."""
        same = next((track for track in self.now if np.array_equal(track.sample, sample)), None)
        if same is not None:
            return same
        here = {track.number for track in self.now}
        track = self.follow(sample, [track for track in self.before if track.number not in here])
        if track is None:
            track = self.follow(sample, self.now, repeated=True)
            if track is not None:
                self.now = [other for other in self.now if other.number != track.number]
        if track is None and self.first:
            # Another part of a batch, or another run: either way it computes here and goes its own way.
            self.number += 1
            track = Track(self.number, sample)
        if track is not None:
            self.now.append(track)
        return track

    def follow(self, sample: np.ndarray, tracks: list[Track], repeated: bool = False) -> Track | None:
        """The track that the sample goes on with; None where none explains it, or two do."""
        shares = sorted(((track.explains(sample), i) for i, track in enumerate(tracks)), reverse=True)
        least = INEXACT if self.exact else EXPLAINED
        if not shares or shares[0][0] < least or (len(shares) > 1 and shares[1][0] > shares[0][0] - 1e-3):
            return None
        share, i = shares[0]
        self.exact = self.exact or EXACT < share < 1.0
        return tracks[i].next(sample, tracks[i].evaluation + 1 if repeated else 0)

    def start(self, sample: np.ndarray) -> Track:
        self.number, self.first, self.exact = 0, True, False
        self.now, self.before = [Track(0, sample)], []
        return self.now[0]

    def ended(self, x: Tensor, out: Any) -> None:
        """A call has ended; its values come to the host with the next one."""
        tensor = output_tensor(out)
        part, predicted = alike(x, tensor)
        self.leading = part.shape[1] if predicted is not None else 0
        self.waiting = seen_of(x, tensor)
