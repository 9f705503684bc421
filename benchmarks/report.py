"""What every benchmark ends with: a table, a JSON file on request, and its claims checked.

The benchmarks measure; this only writes down.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Claim:
    """A number that the project promises. `bar` is the promise, `holds` whether `value` keeps it."""

    name: str
    value: float
    bar: str
    holds: bool

    @classmethod
    def at_least(cls, name: str, value: float, bar: float) -> Claim:
        return cls(name, value, f">= {bar}", value >= bar)

    @classmethod
    def below(cls, name: str, value: float, bar: float) -> Claim:
        return cls(name, value, f"< {bar}", value < bar)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, rows and claims to FILE")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a claim falls short")


def machine() -> dict[str, Any]:
    """Describe where the numbers come from."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "grpcio", "gradwire")},
    }


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


def finish(title: str, rows: Sequence[dict[str, Any]], claims: Sequence[Claim], arguments: argparse.Namespace) -> None:
    """Print the rows and claims, write the JSON file, and exit with 1 where asked to check and a claim falls short."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    where = machine()
    table = Table(title=title, caption=", ".join(f"{key} {value}" for key, value in where.items()))
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*map(_shown, row.values()))
    console.print(table)
    verdicts = Table(title="claims")
    for name in ("claim", "value", "bar", "holds"):
        verdicts.add_column(name, justify="right" if name in ("value", "bar") else "left")
    for claim in claims:
        verdicts.add_row(claim.name, f"{claim.value:.3f}", claim.bar, "yes" if claim.holds else "NO")
    console.print(verdicts)
    if arguments.json:
        content = {"machine": where, "rows": list(rows), "claims": [asdict(claim) for claim in claims]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    if arguments.check and not all(claim.holds for claim in claims):
        sys.exit(1)
