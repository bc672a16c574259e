"""What we set out to reach on one GPU, computed from a speed table; what was not measured leaves its goal open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.speed.models import PACKED, PAPER, QANDC
from benchmarks.speed.runs import CHOSEN, Row, fastest, find
from benchmarks.speed.table import EQUAL_TIME, per_step


@dataclass(frozen=True)
class Goal:
    """`value` None: not measured. `least`: at least the bound, else at most."""

    text: str
    bound: float
    value: float | None
    least: bool = True

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.least else self.value <= self.bound


def goals(table: Mapping[str, Any]) -> list[Goal]:
    """Of the table's first setting, and of batches 1 and 32 at the same size where they were measured."""
    rows: Sequence[Row] = [row for row in table["rows"] if not row["problem"]]
    main = table["rows"][0]["setting"]
    here = [row for row in rows if row["setting"] == main]
    wide = [row for row in rows if row["setting"] == main.split(",")[0] + ", batch 32"]
    fast, base, paper = find(here, QANDC, CHOSEN), fastest(here), find(here, PAPER)
    fewer = next((row for row in here if row["schedule"].endswith(EQUAL_TIME)), None)
    return [
        Goal("times as fast as fp32 eager with 250 steps", 100, ratio(paper, fast, "total")),
        Goal("times as fast as compiled full precision, same steps", 4, ratio(base, fast, "total")),
        Goal("error / error of as many steps as fit its time", 1, ratio(fast, fewer, "error"), least=False),
        Goal("a computed W8A8 step at batch 32: times as fast as compiled", 1.4,
             ratio(fastest(wide), find(wide, QANDC), "computed")),
        Goal("int8 products / measured ceiling, the model's four largest", 0.7, product_share(table)),
        Goal("a reused step / a computed one", 0.02, reused_share(fast), least=False),
        Goal("of a run, outside its steps", 0.01, outside(find(here, QANDC)), least=False),
        Goal("batch 1: a computed step / its floor", 1.3, over_floor(table, main), least=False),
        Goal("W8A8 bytes / full precision's", 0.55, bytes_share(here, QANDC), least=False),
        Goal("W4A8 bytes / full precision's", 0.32, bytes_share(here, PACKED), least=False),
    ]  # fmt: skip


def ratio(above: Row | None, below: Row | None, key: str) -> float | None:
    if above is None or below is None or above[key] is None or not below[key]:
        return None
    return above[key] / below[key]


def reused_share(row: Row | None) -> float | None:
    return None if row is None or row["reused"] is None else row["reused"] / row["computed"]


def outside(row: Row | None) -> float | None:
    """What a run takes beyond its steps: modulations, noise and Python."""
    if row is None or row["extrapolated"] or row["reused"] is not None:
        return None
    return 1 - row["steps"] * row["computed"] / row["total"]


def over_floor(table: Mapping[str, Any], main: str) -> float | None:
    """A step of one image over the least that memory, arithmetic and launches allow."""
    label = main.split(",")[0] + ", batch 1"
    row = find((row for row in table["rows"] if row["setting"] == label and not row["problem"]), QANDC)
    floor = table.get("floors", {}).get(label)
    return None if row is None or not floor else per_step(row) / floor


def bytes_share(rows: Sequence[Row], subject: str) -> float | None:
    return ratio(find(rows, subject), fastest(rows), "weights")


def product_share(table: Mapping[str, Any]) -> float | None:
    """The lowest share of the int8 ceiling among the products of the blocks, each by its fastest kernel."""
    shares = [
        fastest_product(row["methods"]) for row in table.get("gemms", []) if min(row["columns"], row["inner"]) > 64
    ]
    return min((share for share in shares if share is not None), default=None) if None not in shares else None


def fastest_product(methods: Mapping[str, Any]) -> float | None:
    """Share of the ceiling that the product with scales reaches; rounding inputs is another row."""
    found = [
        measured["share"] for name, measured in methods.items() if name.endswith("int8_matmul") and measured is not None
    ]
    return max((share for share in found if share is not None), default=None)
