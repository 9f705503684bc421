"""Renders and lints the Helm chart, on request: JSON on standard input, answers on standard output.

A process of its own: Helm is a Go library, whose runtime takes over the signals and threads of whoever loads it.
Run by helm_chart.py.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import helm_python as helm


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return {"result": …}, or {"error": the message, "kind": its class}."""
    kind, chart, values = request["do"], request["chart"], request["values"]
    try:
        if kind == "lint":
            return {"result": helm.lint(chart, values, strict=True)["messages"]}
        if kind == "package":
            return {"result": helm.package(chart, destination=request["destination"])}
        with helm.Chart.load(chart) as loaded:
            return {"result": loaded.render(values, name=request["name"], namespace=request["namespace"])}
    except helm.HelmError as error:
        return {"error": str(error), "kind": type(error).__name__}


if __name__ == "__main__":
    json.dump([answer(request) for request in json.load(sys.stdin)], sys.stdout)
