"""The grids of stages × replicas × tensor that were planned, as a table on a terminal."""

from __future__ import annotations

from rich.table import Table

from gradwire.cli.tables import Column, table
from gradwire.grid_search import GridSearch
from gradwire.units import bytes_unit, seconds_unit


def grid_view(search: GridSearch, width: int) -> Table:
    """Return the table, the chosen grid first. width: of the terminal."""
    grids = search.grids
    planned = [grid for grid in grids if grid.plan is not None]
    time = seconds_unit(grid.plan.predicted.seconds for grid in planned if grid.plan is not None)
    size = bytes_unit(grid.peak_bytes for grid in planned)
    traffic = bytes_unit(grid.traffic_bytes for grid in planned)
    steps = ["" if grid.plan is None else time.show(grid.plan.predicted.seconds) for grid in grids]
    bubbles = ["" if grid.plan is None else f"{grid.plan.predicted.bubble:.1%}" for grid in grids]
    columns = [
        Column("", ["→" if grid is search.chosen else "" for grid in grids]),
        Column("stages", [str(grid.stages) for grid in grids]),
        Column("replicas", [str(grid.replicas) for grid in grids]),
        Column("tensor", [str(grid.tensor) for grid in grids]),
        Column("servers", [str(grid.servers) for grid in grids], 1),
        Column(f"step ({time.name})", steps),
        Column("bubble", bubbles, 2),
        Column(f"holds ({size.name})", ["" if grid.plan is None else size.show(grid.peak_bytes) for grid in grids]),
        Column(f"traffic ({traffic.name})", ["" if g.plan is None else traffic.show(g.traffic_bytes) for g in grids]),
        Column("why not", [grid.reason for grid in grids], 3, is_text=True),
    ]
    styles = ["bold" if grid is search.chosen else "" if grid.fits else "dim" for grid in grids]
    return table("Grids: a step, the server that holds most, and what travels in a step", columns, width, styles)
