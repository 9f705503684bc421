"""Writes the dashboards into a directory, by default the one that is committed: `make dashboards`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from gradwire_dashboards.communication import communication
from gradwire_dashboards.overview import overview
from gradwire_dashboards.panels import Board
from gradwire_dashboards.pipeline import pipeline

_DASHBOARDS = {"overview": overview, "pipeline": pipeline, "communication": communication}
_COMMITTED = Path(__file__).parent / "dashboards"


def as_text(made: Board) -> str:
    """Return a dashboard as the JSON that Grafana reads, with a number for each panel."""
    built = made.build()
    for number, panel in enumerate(built.panels or (), start=1):
        panel.id_val = number
    content = json.loads(json.dumps(built, cls=JSONEncoder))
    for link in content["links"]:
        del link["placement"]  # in sight, not in a menu
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def main(directory: Path) -> None:
    for name, make in _DASHBOARDS.items():
        (directory / f"{name}.json").write_text(as_text(make()))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else _COMMITTED)
