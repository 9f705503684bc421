"""What the committed dashboards ask Prometheus, and asking it: for tests with real services behind it."""

from __future__ import annotations

import json
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARDS = Path(__file__).parents[1] / "docker/grafana/dashboards"
# Of Grafana, four times the interval of scrapes.
RATE_INTERVAL = "20s"


@dataclass(frozen=True)
class PanelQuery:
    """One expression of one panel, with Grafana's variables filled in."""

    dashboard: str
    panel: str
    expression: str
    instant: bool
    # With labels in double braces; empty: none.
    legend: str

    def __str__(self) -> str:
        return f"{self.dashboard}, {self.panel!r}: {self.expression}"


def load() -> dict[str, dict[str, Any]]:
    """The dashboards, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The panels that show something, those within collapsed rows too."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panel["panels"]
        else:
            yield panel


def filled_in(expression: str, rate_interval: str = RATE_INTERVAL) -> str:
    """An expression as Grafana sends it when everything is chosen; KeyError for a variable that is not known."""
    variables = {"run": ".+", "stage": ".+", "__rate_interval": rate_interval}
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: variables[found[1] or found[2]], expression)


def panel_queries(rate_interval: str = RATE_INTERVAL) -> list[PanelQuery]:
    return [
        PanelQuery(
            name, panel["title"], filled_in(target["expr"], rate_interval), target["instant"], target["legendFormat"]
        )
        for name, dashboard in load().items()
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]


def ask(prometheus: str, path: str, **parameters: object) -> Any:
    """The data that Prometheus answers with. prometheus: its URL. path: of its API, below /api/v1/."""
    encoded = urllib.parse.urlencode(parameters)
    with urllib.request.urlopen(f"{prometheus}/api/v1/{path}?{encoded}", timeout=30) as reply:
        answer = json.load(reply)
    assert answer["status"] == "success", answer
    return answer["data"]


def shown(prometheus: str, query: PanelQuery, start: float, end: float) -> list[tuple[dict[str, str], list[float]]]:
    """The series that a panel would show of a time, labels and values; none where it would say "No data"."""
    if query.instant:
        found = ask(prometheus, "query", query=query.expression, time=end)["result"]
        return [(series["metric"], [float(series["value"][1])]) for series in found]
    step = max((end - start) / 100, 0.5)
    found = ask(prometheus, "query_range", query=query.expression, start=start, end=end, step=step)["result"]
    return [(series["metric"], [float(value) for _, value in series["values"]]) for series in found]
