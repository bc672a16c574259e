"""Candidates for calibration, every sample of a model's own trajectories, and the choice among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .distances import prediction_distances
from .selection import random_select, stratified_select
from .tap import tap_select

FEATURES = 16384  # values of a sample that TAP clusters; larger latents are averaged down to this
SELECTIONS = ("tap", "stratified", "random")
SURPLUS = 2.0  # with that many candidates for a sample, statistics of all still cost less than sampling anew


class Batch(NamedTuple):
    """One sampling run: the seed of its noise, how many images, and which: those from number `first` on of a prompt."""

    seed: int
    size: int
    first: int
    prompt: int = 0


@dataclass(frozen=True)
class CalibrationConfig:
    """How much to sample, how to choose calibration samples, and how many activations to keep of each layer.

    Images take the `prompts` in turn; those of a run share one, because prompts may differ in length. Where a prompt
    is a batch of several itself, its images take its `rows` in turn.

    Nothing is chosen where there are at most `surplus` times as many candidates as `samples`: all are taken, in the
    pass that samples them. Statistics of more samples cost less than sampling all trajectories a second time.
    """

    trajectories: int = 32
    batch_size: int = 16
    samples: int = 400
    selection: str = "tap"
    clusters: int = 50
    time_scale: float = 5.0
    computed_only: bool = True
    hessians: bool = True
    seed: int = 501
    memory_gb: float = 4.0
    tokens: int = 4096
    held_out: int = 8
    prompts: int = 1
    rows: int = 1
    surplus: float = 1.0

    @property
    def most(self) -> int:
        """Number of candidates up to which all of them are taken; of a single image some are left to hold out."""
        return int(self.surplus * self.samples) if self.apart or not self.held_out else self.samples

    @property
    def images(self) -> int:
        """Trajectories to sample; each prompt has at least one."""
        return max(self.trajectories, self.prompts)

    @property
    def apart(self) -> int:
        """How many trajectories, the last ones, are held out as a whole: of several prompts up to an eighth of all."""
        if not self.held_out or self.images == 1:
            return 0
        return max(1, min(self.prompts * self.rows, self.held_out, self.images // 8))

    @property
    def shared_runs(self) -> int:
        """Number of sampling runs before those of trajectories that are held out."""
        return len(list(self.batches())) - self.apart

    def batches(self) -> Iterator[Batch]:
        """Every sampling run; a trajectory held out has its own."""
        shared, number = self.images - self.apart, 0
        for prompt in range(min(self.prompts, shared)):
            count = len(range(prompt, shared, self.prompts))
            for first in range(0, count, self.batch_size):
                yield Batch(self.seed_of(number), min(self.batch_size, count - first), first, prompt)
                number += 1
        for image in range(shared, self.images):
            yield Batch(self.seed_of(number), 1, *divmod(image, self.prompts))
            number += 1

    def seed_of(self, run: int) -> int:
        return (self.seed + run) % 2**64


@dataclass(frozen=True)
class Choice:
    """Samples to observe (n, 4): run, call within the run, image within the batch, how many conditions the call has;
    and to hold out (h, 4): run, call, image, which condition.
    """

    samples: Tensor
    held_out: Tensor

    def __contains__(self, run: int) -> bool:
        return bool((self.samples[:, 0] == run).any() or (self.held_out[:, 0] == run).any())


@dataclass
class Candidates:
    """Every sample of every model call: features (N, D), step indices (N,), whether the call computed (N,), and
    where it came from, (N, 4) as in a Choice.
    """

    features: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    computed: list[Tensor] = field(default_factory=list)
    origin: list[Tensor] = field(default_factory=list)
    predictions: list[dict[int, Tensor]] = field(default_factory=list)
    sigmas: Tensor | None = None

    def add(
        self, run: int, call: int, step: int, sigmas: Tensor, x: Tensor, out: Tensor, conditions: int, computed: bool
    ) -> None:
        """Notes the samples of one prediction: x as `features_of` gives it, and the denoised samples out (N, ...)."""
        while len(self.predictions) <= run:
            self.predictions.append({})
        self.sigmas, count = sigmas, len(x)
        self.predictions[run].setdefault(step, features_of(out).flatten())
        self.features.append(x)
        self.steps.append(torch.full((count,), step))
        self.computed.append(torch.full((count,), computed))
        self.origin.append(torch.tensor([[run, call, image, conditions] for image in range(count)]))

    @classmethod
    def joined(cls, parts: Sequence[Candidates]) -> Candidates:
        """One pool of candidates of different runs, in the order of the parts."""
        whole = cls()
        for part in parts:
            for name in ("features", "steps", "computed", "origin"):
                getattr(whole, name).extend(getattr(part, name))
            missing = len(part.predictions) - len(whole.predictions)
            whole.predictions += [{} for _ in range(missing)]
            for run, predictions in enumerate(part.predictions):
                whole.predictions[run] |= predictions
            whole.sigmas = part.sigmas if whole.sigmas is None else whole.sigmas
        return whole

    def missing(self) -> str:
        """Why there are no distances between steps: a "cache" left some out, or the sampler skips "steps"; or ""."""
        if not all(bool(part.all()) for part in self.computed):
            return "cache"
        steps = range(0 if self.sigmas is None else len(self.sigmas) - 1)
        return "steps" if not steps or any(step not in run for run in self.predictions for step in steps) else ""

    def distances(self) -> Tensor | None:
        """Distances between the predictions of all steps (T, T); None where one is missing."""
        if self.sigmas is None or self.missing():
            return None
        steps = range(len(self.sigmas) - 1)
        rows = [torch.cat([run[step] for run in self.predictions]) for step in steps]
        return prediction_distances(torch.stack(rows), self.sigmas)

    def choose(self, plan: CalibrationConfig) -> Choice:
        """The samples that the plan's selection takes, and computed ones that it could not or did not take."""
        origin, spare, allowed = torch.cat(self.origin), torch.cat(self.computed), self.allowed(plan)
        if plan.apart:
            spare &= origin[:, 0] >= len(self.predictions) - plan.apart
        kept = allowed.nonzero().flatten()
        chosen = kept if len(kept) <= plan.most else self.select(kept, plan)
        spare[chosen] = False
        return Choice(origin[chosen], spread_over_runs(origin[spare], plan.held_out))

    def __len__(self) -> int:
        return sum(map(len, self.computed))

    def least_share(self, plan: CalibrationConfig) -> float:
        """The fraction of the candidates so far that are on steps from which samples are chosen, but for one step."""
        if not plan.computed_only:
            return 1.0
        taken = sum(int(part.sum()) for part in self.computed) - (len(self.computed[0]) if self.computed else 0)
        return taken / max(len(self), 1)

    def allowed(self, plan: CalibrationConfig) -> Tensor:
        """(N,) which candidates may be chosen: not those of runs that are held out, nor of reused steps if so asked."""
        origin, computed = torch.cat(self.origin), torch.cat(self.computed)
        allowed = computed if plan.computed_only else torch.ones_like(computed)
        return allowed & (origin[:, 0] < len(self.predictions) - plan.apart)

    def foreseen(self, plan: CalibrationConfig) -> Tensor:
        """The samples (h, 4) to hold out if the runs that are held out go as the first one did."""
        origin, computed = torch.cat(self.origin), torch.cat(self.computed)
        first = origin[computed & (origin[:, 0] == origin[0, 0]) & (origin[:, 2] == 0)]
        runs = torch.arange(plan.shared_runs, plan.shared_runs + plan.apart)
        likely = first.repeat(len(runs), 1)
        likely[:, 0] = runs.repeat_interleave(len(first))
        return spread_over_runs(likely, plan.held_out)

    def select(self, kept: Tensor, plan: CalibrationConfig) -> Tensor:
        """Indices of the samples that are taken from those at `kept`."""
        steps = torch.cat(self.steps)[kept]
        if plan.selection == "tap":
            clusters, features = min(plan.clusters, plan.samples, len(kept)), torch.cat(self.features)[kept]
            taken = tap_select(
                features, steps, plan.samples, clusters, time_scale=plan.time_scale, seed=plan.seed
            ).indices
        elif plan.selection == "stratified":
            taken = stratified_select(steps, plan.samples, plan.seed)
        else:
            taken = random_select(len(kept), plan.samples, plan.seed)
        return kept[taken]


def spread_over_runs(calls: Tensor, count: int) -> Tensor:
    """At most `count` conditions (h, 4), as many of each run as the others have where there are so many."""
    runs = [calls[calls[:, 0] == run] for run in calls[:, 0].unique().tolist()]
    shares = [(count * (i + 1)) // len(runs) - (count * i) // len(runs) for i in range(len(runs))]
    return torch.cat([calls[:0], *(spread(part, share) for part, share in zip(runs, shares))])


def spread(calls: Tensor, count: int) -> Tensor:
    """At most `count` conditions (h, 4) evenly over the calls (n, 4): one of each call in turn, then the next."""
    found: list[list[int]] = []
    for shift in range(int(calls[:, 3].max()) if len(calls) else 0):
        wanted = min(count - len(found), len(calls))
        for i in range(wanted):
            number = (2 * i + 1) * len(calls) // (2 * wanted)
            *place, conditions = calls[number].tolist()
            if shift < conditions:  # the first full pass takes condition i of call i, and later ones go on from there
                found.append([*place, ((number if shift else i) + shift) % conditions])
    return torch.tensor(found, dtype=torch.long).reshape(-1, 4)


def features_of(x: Tensor) -> Tensor:
    """A sample as TAP sees it (N, D), float32 on CPU."""
    return reduced(x).cpu()


def reduced(x: Tensor) -> Tensor:
    """Samples (N, ...) averaged down to at most FEATURES values each (N, D), float32, on their device."""
    values = x[0].numel()
    if values > FEATURES and x.ndim >= 4:
        side = max(1, int((FEATURES / (values / (x.shape[-1] * x.shape[-2]))) ** 0.5))
        x = F.adaptive_avg_pool2d(x.flatten(1, -3).float(), side)
    elif values > FEATURES:  # sound, or several latents packed into one
        x = F.adaptive_avg_pool1d(x.flatten(1).float(), FEATURES)
    return x.flatten(1).float()
