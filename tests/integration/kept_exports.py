"""Exports that are kept, for sweeps that run one model many times: an export is most of a short run's time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from torch import nn

from gradwire.graph import ExportedModel, export_model


def keep_exports(patch: pytest.MonkeyPatch) -> dict[int, ExportedModel]:
    """Export a model once, whatever the plan, and hand its tensors out anew each time. Return what is kept, by id.

    A model is known by its id, so it is kept too; it always comes with the same loss, example and precision.
    """
    kept: dict[int, ExportedModel] = {}
    models: list[nn.Module] = []

    def export(model: nn.Module, *arguments: Any, **settings: Any) -> ExportedModel:
        if id(model) not in kept:
            kept[id(model)] = export_model(model, *arguments, **settings)
            models.append(model)
        return dataclasses.replace(kept[id(model)], tensors=dict(kept[id(model)].tensors))

    patch.setattr("gradwire.run_request.export_model", export)
    return kept
