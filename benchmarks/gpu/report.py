"""A speed table as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.speed.runs import fastest

from .goals import Goal, goals

MISSING = "not measured"
GPU_GOALS = "The goals are of one GPU: not measured."


def markdown(table: Mapping[str, Any]) -> str:
    parts = [header(table), *words(table), goal_table(goals(table)) if table["hardware"]["cuda"] else GPU_GOALS]
    for setting in dict.fromkeys(row["setting"] for row in table["rows"]):
        rows = [row for row in table["rows"] if row["setting"] == setting]
        parts += [f"## {setting}", row_table(rows)]
    return "\n\n".join([*parts, product_table(table)]) + "\n"


def header(table: Mapping[str, Any]) -> str:
    hardware, ceilings = table["hardware"], table["ceilings"]
    reached = ", ".join(
        f"{name} {amount(value, unit)}"
        for name, unit in (("float32", "FLOP/s"), ("tf32", "FLOP/s"), ("bfloat16", "FLOP/s"), ("int8", "OP/s"),
                           ("bandwidth", "B/s"))
        if (value := ceilings[name]) is not None
    )  # fmt: skip
    versions = ", ".join(f"{package} {number}" for package, number in table["versions"].items())
    return (
        f"# Speed on {hardware['device']}\n\n{table['name']}, random weights, guidance, DDIM, {hardware['threads']} "
        f"threads; {versions}. Times are medians, of runs with their range; errors are relative L2 distances to the "
        f"first row's latents. Integer rows run on the {table['kernels']} kernels, W4A8 on comfy-kitchen's. Best rates "
        f"measured here: {reached}. Made by `{table['command']}`."
    )


def words(table: Mapping[str, Any]) -> list[str]:
    return ["\n".join(step["words"]) for step in table.get("steps", [])]


def goal_table(found: Sequence[Goal]) -> str:
    verdicts = {True: "met", False: "missed", None: ""}
    lines = ["| goal | bound | measured | |", "|---|---|---|---|"]
    for goal in found:
        value = MISSING if goal.value is None else f"{goal.value:.3g}"
        sign = "at least" if goal.least else "at most"
        lines.append(f"| {goal.text} | {sign} {goal.bound:g} | {value} | {verdicts[goal.met]} |")
    return "\n".join(lines)


def row_table(rows: Sequence[Mapping[str, Any]]) -> str:
    base = fastest(rows)
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "": lambda row: row["subject"],
        "steps": lambda row: f"{row['schedule']}: {row['computed_steps']} of {row['steps']}",
        "computed step, ms": lambda row: scaled(row["computed"], 1e3, "{:.2f}"),
        "reused step, ms": lambda row: scaled(row["reused"], 1e3, "{:.3f}"),
        "run, s": lambda row: ("~" if row["extrapolated"] else "") + scaled(row["total"], 1, "{:.3f}"),
        "range": lambda row: f"{min(row['totals']):.3f}-{max(row['totals']):.3f}" if len(row["totals"]) > 1 else "",
        "speedup": lambda row: f"{base['total'] / row['total']:.2f}x" if base and row["total"] else "",
        "error": lambda row: scaled(row["error"], 1, "{:.4f}"),
        "weights, GB": lambda row: scaled(row["weights"], 1e-9, "{:.2f}"),
        "peak, GB": lambda row: scaled(row["memory"], 1e-9, "{:.2f}"),
    }
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        if row["problem"]:
            lines.append(
                f"| {row['subject']} | {row['schedule']} | fails: {row['problem'].replace('|', '/')} |"
                + " |" * (len(columns) - 3)
            )
        else:
            lines.append("| " + " | ".join(cell(row) for cell in columns.values()) + " |")
    return "\n".join(lines)


def product_table(table: Mapping[str, Any]) -> str:
    rows = table.get("gemms", [])
    if not rows:
        return f"## Matrix products\n\n{MISSING}"
    names = list(rows[0]["methods"])
    lines = ["## Matrix products", "", "Microseconds, and the share of the ceiling (of the bandwidth for quantizers).",
             "", "| M x N x K | " + " | ".join(name.replace("_", " ") for name in names) + " |",
             "|---" * (1 + len(names)) + "|"]  # fmt: skip
    for row in rows:
        cells = [product_cell(row["methods"][name]) for name in names]
        lines.append(f"| {row['rows']} x {row['columns']} x {row['inner']} | " + " | ".join(cells) + " |")
    apart = [row["differences"] for row in rows if "differences" in row]
    if apart:
        worst = ", ".join(f"{name} {max(each[name] for each in apart):.2g}" for name in apart[0])
        lines += [
            "",
            f"Largest differences of the Triton kernels from torch's (codes in units, values relative): {worst}.",
        ]
    errors = {f"{name}: {message}" for row in rows for name, message in row["error"].items()}
    return "\n".join([*lines, *(f"\n{error}" for error in sorted(errors))])


def product_cell(measured: Mapping[str, float] | None) -> str:
    if measured is None:
        return "fails"
    share = "" if measured["share"] is None else f" ({100 * measured['share']:.0f} %)"
    return f"{1e6 * measured['seconds']:.0f}{share}"


def scaled(value: float | None, factor: float, format: str) -> str:
    return "" if value is None else format.format(factor * value)


def amount(value: float, unit: str) -> str:
    for prefix, size in (("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
