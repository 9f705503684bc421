"""The user's model as data: export, serialisation, cuts, costs, checks of batches.

Leaves running the graphs to the stage servers, and where to cut them to the coordinator.
"""

from gradwire.graph.batch import Batch, FlatBatch, Unbatched, unbatched
from gradwire.graph.exported import ExportedModel, export_model

__all__ = ["Batch", "ExportedModel", "FlatBatch", "Unbatched", "export_model", "unbatched"]
