"""What all dashboards have in common: their variables, and what a panel of each kind looks like.

The form is Grafana's classic one, which the builder advises against: each Grafana in use reads it from files, and the
newer one only some. Leaves to others: what is shown (overview.py, pipeline.py, communication.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import units

# Where the alerts of docker/prometheus/alerts.yml are: what is coloured here is what fires there.
LEAST_UTILISATION = 0.8
LARGEST_BUBBLE = 0.1
LARGEST_COMMUNICATION = 0.3
LONGEST_STANDSTILL_SECONDS = 30

GREEN, RED, BLUE, CLEAR = "green", "red", "blue", "transparent"
WIDTH = 24
# Of a server in a run, which is all of these.
SERVER = "stage {{stage}}, replica {{replica}}, shard {{shard}} ({{run}})"
RUN = 'run=~"$run"'

Board: TypeAlias = dashboard.Dashboard
Series: TypeAlias = timeseries.Panel
Query: TypeAlias = prometheus.Dataquery

_SOURCE = looks.DataSourceRef(type_val="prometheus", uid="${datasource}")
_HEIGHT = 8


def query(expression: str, legend: str) -> Query:
    """Return a query over the time that is shown."""
    return prometheus.Dataquery().expr(expression).legend_format(legend).range().datasource(_SOURCE)


def now(expression: str, legend: str = "") -> Query:
    """Return a query for the end of the time that is shown."""
    return prometheus.Dataquery().expr(expression).legend_format(legend).instant().datasource(_SOURCE)


def quantile(share: float, histogram: str, matchers: str, by: str) -> str:
    """Return the expression of a quantile of a histogram, by labels."""
    rate = f"rate({histogram}_bucket{{{matchers}}}[$__rate_interval])"
    return f"histogram_quantile({share}, sum by ({', '.join(filter(None, ('le', by)))}) ({rate}))"


def scale(*values: tuple[float | None, str]) -> dashboard.ThresholdsConfig:
    """Return colours from values on; None: from the least."""
    made = [models.Threshold(value=value, color=color) for value, color in values]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(made)


def at_least(limit: float, fine: str = GREEN) -> dashboard.ThresholdsConfig:
    return scale((None, RED), (limit, fine))


def at_most(limit: float, fine: str = GREEN) -> dashboard.ThresholdsConfig:
    return scale((None, fine), (limit, RED))


def chart(
    title: str,
    description: str,
    queries: Iterable[Query],
    *,
    unit: str,
    span: int = 12,
    limit: dashboard.ThresholdsConfig | None = None,
    stacked: bool = False,
    least: float | None = 0,
    most: float | None = None,
    colors: Mapping[str, str] | None = None,
) -> Series:
    """Return lines over time, or areas on each other. limit: drawn as a line, and shaded beyond it."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(_SOURCE)
        .targets([each.ref_id(ref) for each, ref in zip(queries, "ABCDEF", strict=False)])
        .unit(unit)
        .height(_HEIGHT)
        .span(span)
        .line_width(1)
        .fill_opacity(70 if stacked else 8)
        .show_points(looks.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(looks.LegendDisplayMode.TABLE)
            .placement(looks.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["mean", "lastNotNull"])
        )
        .tooltip(common.VizTooltipOptions().mode(looks.TooltipDisplayMode.MULTI).sort(looks.SortOrder.DESCENDING))
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(looks.StackingMode.NORMAL).group("A"))
    if least is not None:
        panel.min(least)
    if most is not None:
        panel.max(most)
    if limit is not None:
        panel.thresholds(limit)
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(looks.GraphThresholdsStyleMode.DASHED_AND_AREA))
    for name, color in (colors or {}).items():
        fixed = {"mode": "fixed", "fixedColor": color}
        panel.override_by_name(name, [models.DynamicConfigValue(id_val="color", value=fixed)])
    return panel


def mirrored(panel: Series, ref: str) -> Series:
    """Draw a query of a panel below the axis, and let the axis go there."""
    below = models.DynamicConfigValue(id_val="custom.transform", value=looks.GraphTransform.NEGATIVE_Y)
    return panel.override_by_query(ref, [below])


def figure(
    title: str,
    description: str,
    ask: Query,
    *,
    unit: str = units.Short,
    span: int = 4,
    limit: dashboard.ThresholdsConfig,
) -> stat.Panel:
    """Return one number, with a background in the colour of its threshold."""
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(_SOURCE)
        .with_target(ask)
        .unit(unit)
        .height(4)
        .span(span)
        .thresholds(limit)
        .color_mode(looks.BigValueColorMode.BACKGROUND)
        .graph_mode(looks.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def bars(
    title: str,
    description: str,
    ask: Query,
    *,
    unit: str,
    limit: dashboard.ThresholdsConfig,
    span: int = 12,
    most: float,
) -> bargauge.Panel:
    """Return a bar for each series, as it is now."""
    return (
        bargauge.Panel()
        .title(title)
        .description(description)
        .datasource(_SOURCE)
        .with_target(ask)
        .unit(unit)
        .min(0)
        .max(most)
        .height(_HEIGHT)
        .span(span)
        .thresholds(limit)
        .orientation(looks.VizOrientation.HORIZONTAL)
        .display_mode(looks.BarGaugeDisplayMode.BASIC)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def states(
    title: str, description: str, ask: Query, *, names: Mapping[str, tuple[str, str]], span: int = 12
) -> statetimeline.Panel:
    """Return a band for each series, coloured by value. names: of each value, its word and its colour."""
    words = {
        value: models.ValueMappingResult(text=text, color=color, index=index)
        for index, (value, (text, color)) in enumerate(names.items())
    }
    return (
        statetimeline.Panel()
        .title(title)
        .description(description)
        .datasource(_SOURCE)
        .with_target(ask)
        .unit(units.NoUnit)
        .height(_HEIGHT)
        .span(span)
        .mappings([models.ValueMap(options=words)])
        .show_value(looks.VisibilityMode.NEVER)
        .legend(common.VizLegendOptions().show_legend(False).display_mode(looks.LegendDisplayMode.LIST))
    )


def board(name: str, title: str, description: str, *variables: dashboard.QueryVariable) -> Board:
    """Return an empty dashboard with a data source and runs to choose, and links to the others."""
    made = (
        dashboard.Dashboard(title)
        .uid(f"gradwire-{name}")
        .description(description)
        .tags(["gradwire"])
        .time("now-30m", "now")
        .refresh("10s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(chosen("run", "Run", "label_values(gradwire_steps_total, run)"))
    )
    for variable in variables:
        made.with_variable(variable)
    return made.link(
        dashboard.DashboardLink("Gradwire")
        .type(models.DashboardLinkType.DASHBOARDS)
        .tags(["gradwire"])
        .include_vars(True)
        .keep_time(True)
    )


def chosen(name: str, label: str, values: str) -> dashboard.QueryVariable:
    """Return a variable of which all values are chosen at first. values: the query for them."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .query({"query": values, "refId": name})
        .datasource(_SOURCE)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.NATURAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


def row(title: str) -> dashboard.Row:
    return dashboard.Row(title)
