"""Gradwire's Python interface: the names that a training script uses.

Names are imported on first use (PEP 562): `import gradwire` costs next to nothing, and the command line can start
servers before torch is loaded here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from gradwire.checkpoint.background import CheckpointWarning, Save
    from gradwire.cluster import Cluster, connect
    from gradwire.graph import unbatched
    from gradwire.local_cluster import LocalCluster, local
    from gradwire.meta import meta_parameters
    from gradwire.parallel_linear import ColumnParallelLinear, RowParallelLinear
    from gradwire.plan import Plan
    from gradwire.replanning import Replan
    from gradwire.report import Report
    from gradwire.results import StepResult
    from gradwire.trainer import Trainer
    from gradwire.verification import Verification, verify
    from gradwire.weights import FileWeights, ServerWeights
    from gradwire_protocol.errors import (
        Aborted,
        BatchError,
        CheckpointError,
        DataError,
        FrameError,
        GradwireError,
        InternalError,
        LimitExceeded,
        ModelError,
        NotAllowed,
        OptimizerError,
        PlanError,
        RunNotFound,
        ServerBusy,
        SettingsError,
        StageFailed,
        StaleGeneration,
        Stalled,
        Stopping,
        Unreachable,
    )
    from gradwire_protocol.tls_files import TlsFiles

_HOMES = {
    "CheckpointWarning": "gradwire.checkpoint.background",
    "Cluster": "gradwire.cluster",
    "ColumnParallelLinear": "gradwire.parallel_linear",
    "FileWeights": "gradwire.weights",
    "LocalCluster": "gradwire.local_cluster",
    "Plan": "gradwire.plan",
    "Replan": "gradwire.replanning",
    "Report": "gradwire.report",
    "RowParallelLinear": "gradwire.parallel_linear",
    "Save": "gradwire.checkpoint.background",
    "ServerWeights": "gradwire.weights",
    "StepResult": "gradwire.results",
    "TlsFiles": "gradwire_protocol.tls_files",
    "Trainer": "gradwire.trainer",
    "Verification": "gradwire.verification",
    "connect": "gradwire.cluster",
    "local": "gradwire.local_cluster",
    "meta_parameters": "gradwire.meta",
    "unbatched": "gradwire.graph",
    "verify": "gradwire.verification",
    "Aborted": "gradwire_protocol.errors",
    "BatchError": "gradwire_protocol.errors",
    "CheckpointError": "gradwire_protocol.errors",
    "DataError": "gradwire_protocol.errors",
    "FrameError": "gradwire_protocol.errors",
    "GradwireError": "gradwire_protocol.errors",
    "InternalError": "gradwire_protocol.errors",
    "LimitExceeded": "gradwire_protocol.errors",
    "ModelError": "gradwire_protocol.errors",
    "NotAllowed": "gradwire_protocol.errors",
    "OptimizerError": "gradwire_protocol.errors",
    "PlanError": "gradwire_protocol.errors",
    "RunNotFound": "gradwire_protocol.errors",
    "ServerBusy": "gradwire_protocol.errors",
    "SettingsError": "gradwire_protocol.errors",
    "StageFailed": "gradwire_protocol.errors",
    "Stalled": "gradwire_protocol.errors",
    "Stopping": "gradwire_protocol.errors",
    "StaleGeneration": "gradwire_protocol.errors",
    "Unreachable": "gradwire_protocol.errors",
}

__all__ = [
    "Aborted",
    "BatchError",
    "CheckpointError",
    "CheckpointWarning",
    "Cluster",
    "ColumnParallelLinear",
    "DataError",
    "FileWeights",
    "FrameError",
    "GradwireError",
    "InternalError",
    "LimitExceeded",
    "LocalCluster",
    "ModelError",
    "NotAllowed",
    "OptimizerError",
    "Plan",
    "PlanError",
    "Replan",
    "Report",
    "RowParallelLinear",
    "RunNotFound",
    "Save",
    "ServerBusy",
    "ServerWeights",
    "SettingsError",
    "StageFailed",
    "StaleGeneration",
    "Stalled",
    "StepResult",
    "Stopping",
    "TlsFiles",
    "Trainer",
    "Unreachable",
    "Verification",
    "connect",
    "local",
    "meta_parameters",
    "unbatched",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("gradwire")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'gradwire' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
