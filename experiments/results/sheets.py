"""Tables of numbers with their intervals."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Sheet:
    """A table: records with the same keys. In the csv a number with an interval is three columns: itself, `low` and
    `high`.
    """

    title: str
    records: list[dict]

    def write(self, file: Path) -> None:
        rows = [
            {
                k: v
                for name, value in record.items()
                for k, v in (value.columns(name) if isinstance(value, Estimate) else {name: value}).items()
            }
            for record in self.records
        ]
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(dict.fromkeys(k for row in rows for k in row)))
            writer.writeheader()
            writer.writerows(rows)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float
    digits: int = 1
    sign: str = ""
    mark: str = ""

    @classmethod
    def of(cls, values: dict, sign: str = "", digits: int = 1, mark: str = "") -> Estimate:
        """From {value, low, high}."""
        return cls(values["value"], values["low"], values["high"], digits, sign, mark)

    @property
    def point(self) -> str:
        return f"{self.value:{self.sign}.{self.digits}f}{self.mark}"

    def columns(self, name: str) -> dict[str, float]:
        return {name: round(self.value, 4), f"{name}, low": round(self.low, 4), f"{name}, high": round(self.high, 4)}

    def __str__(self) -> str:
        return (
            f"{self.value:{self.sign}.{self.digits}f} [{self.low:{self.sign}.{self.digits}f},"
            f" {self.high:{self.sign}.{self.digits}f}]{self.mark}"
        )


def metric_rows(metrics: dict[str, dict], titles: dict[str, str], p: bool = False) -> tuple[list[str], list[list[str]]]:
    """A table of what was measured: its head, the stacks and then their differences from the first, and its rows, of
    which each begins with a title. Metrics with their 95 % intervals where anything was scored, then speed, prunes and,
    where there are any, rollbacks.

    Args:
        metrics: of each stack, as from `generate.measure`, by label.
        titles: of the metrics.
        p: whether differences have their p-values behind them.
    """
    first = next(iter(metrics))
    gaps = {label: values["difference"] for label, values in metrics.items() if "difference" in values}
    rows = []
    for key, title in titles.items() if metrics[first].get("n") else ():
        apart = [f"{Estimate.of(d[key], '+')}" + (f", p = {d[key]['p']:.2g}" if p else "") for d in gaps.values()]
        rows.append([title, *(str(Estimate.of(values[key])) for values in metrics.values()), *apart])
    for key, title in (
        ("tokens_per_second", "tokens/s"),
        ("prunes", "prunes per caption"),
        ("rollbacks", "rollbacks per caption"),
    ):
        if key != "rollbacks" or any(values[key] for values in metrics.values()):
            rows.append([title, *(f"{values[key]:.1f}" for values in metrics.values()), *([""] * len(gaps))])
    return ["", *metrics, *(f"{label} - {first}" for label in gaps)], rows
