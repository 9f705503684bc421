"""The main job's settings: flags over environment over a TOML file over the reference job. Imports no torch."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from gradwire.plan import Plan
from gradwire_protocol.exchanges import parse_exchange
from gradwire_protocol.settings import Settings, load_settings

ENVIRONMENT_PREFIX = "GRADWIRE_"
ScheduleName = Literal["auto", "gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v"]
TensorPlanName = Literal["auto", "gpt", "gpt2", "llama"]
TransportName = Literal["auto", "grpc", "gloo", "nccl"]
TENSOR_HELP = "Servers of each stage, which share its weights and its work"
TENSOR_PLAN_HELP = "How the servers of a stage split its weights: a plan for a known model, or auto"
TRANSPORT_HELP = "What moves the sums of a stage's servers, and of replicas"


class JobSettings(Settings):
    """Everything that `gradwire train` can be told. Fields without a default have it in the reference job's file."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX)

    data: Path | None = Field(None, description="File or folder with text [default: Python's standard library]")
    layers: int = Field(ge=1, description="Layers of the GPT")
    width: int = Field(ge=1, description="Width of its residual stream")
    heads: int = Field(ge=1, description="Attention heads a layer")
    context: int = Field(ge=2, description="Bytes that the model sees")
    batch: int = Field(ge=1, description="Windows of text a step")
    steps: int = Field(ge=1, description="Training steps")
    lr: float = Field(gt=0, description="Peak learning rate")
    warmup_steps: int = Field(ge=0, description="Steps of linear warm-up")
    weight_decay: float = Field(ge=0, description="AdamW's weight decay, of matrices only")
    max_grad_norm: float | None = Field(gt=0, description="Clip the gradient's global norm to this")
    precision: Literal["bf16"] | None = Field(
        None, description="Autocast to bfloat16; fp16 would need a scaled loss [default: no autocast]"
    )
    seed: int = Field(ge=0, lt=2**63, description="Of the first weights and of the order of the text")
    stages: int = Field(ge=1, description="Stage servers of the pipeline")
    replicas: int = Field(1, ge=1, description="Copies of the pipeline that see other data")
    tensor: int = Field(1, ge=1, description=TENSOR_HELP)
    tensor_plan: TensorPlanName = Field("auto", description=TENSOR_PLAN_HELP)
    transport: TransportName = Field("auto", description=TRANSPORT_HELP)
    microbatches: int = Field(ge=1, description="Micro-batches a step, over all replicas")
    schedule: ScheduleName = Field(description="Order of the work on each server")
    virtual_stages: int = Field(1, ge=1, le=16, description="Stages on each server; some schedules need 2")
    recompute: bool = Field(False, description="Run forwards again for their backward, instead of keeping activations")
    activation_compression: Literal["none", "bf16", "fp16", "int8", "auto"] = Field(
        "none", description="Codec of activations and their gradients between stages"
    )
    exchange: str = Field(
        "ring",
        description='How replicas agree: "ring", "parameter-server", or "local": each trains alone for some steps',
    )
    every: int | None = Field(None, ge=1, description="Local steps from one average to the next [default: 50]")
    parameter_servers: int | None = Field(None, ge=1, description="Servers that hold the weights [default: 1]")
    staleness: int | None = Field(None, ge=0, description="Updates that a step's weights may lack [default: 0]")
    compression: str = Field(
        "none", description='Codec of the gradients that replicas exchange: "int8", "topk(density=0.01)", …'
    )
    zero: Literal["auto", "on", "off"] = Field("auto", description="Whether replicas share the optimizer's state")
    window: int = Field(ge=1, le=16, description="Steps in flight")
    stall_seconds: float = Field(
        60.0, ge=1, le=1e6, description="End with an error when nothing moves for this long; above the longest action"
    )
    threads: int = Field(ge=1, description="Compute threads of each stage server of the local cluster")
    evaluate_every: int = Field(ge=1, description="Steps between validations")
    validation_windows: int = Field(ge=1, description="Windows of held-out text a validation")
    save_every: int | None = Field(None, ge=1, description="Steps between checkpoints [default: no checkpoints]")
    keep_checkpoints: int = Field(3, ge=1, description="Newest checkpoints to keep")
    wait_seconds: float = Field(
        0.0,
        ge=0,
        description="How long to wait, at the start, until the cluster at --coordinator has the servers",
    )
    reconnect_seconds: float = Field(
        120.0,
        ge=0,
        description="How long to wait for the cluster at --coordinator if it is lost, to go on from a checkpoint",
    )
    grace_seconds: float = Field(30.0, ge=0, description="From SIGTERM on, to finish the step and to save")
    check: bool = Field(description="End with the comparison of one step with one process")
    coordinator: str | None = Field(None, description="HOST:PORT of a running coordinator [default: a local cluster]")
    tls_authority: Path | None = Field(None, description="PEM file of the authority that both sides trust")
    tls_certificate: Path | None = Field(None, description="PEM file of this client's certificate")
    tls_key: Path | None = Field(None, description="PEM file of this client's key")
    insecure: bool = Field(False, description="Allow plaintext off loopback, on a network that you trust")
    out: Path | None = Field(None, description="Run directory to make [default: runs/<time>]")


def reference_values() -> dict[str, Any]:
    """Return the values of the reference job (examples/reference.toml)."""
    return tomllib.loads(resources.files("gradwire.job").joinpath("reference.toml").read_text())


def load_job_settings(flags: Mapping[str, Any], config: Path | None = None) -> JobSettings:
    """Return the settings for the flags that were given (None: not given). SettingsError names each wrong value."""
    return load_settings(JobSettings, flags, config, reference_values())


def servers_of(settings: JobSettings) -> int:
    """Return how many stage servers the job takes."""
    return settings.stages * settings.replicas * settings.tensor


def parameter_servers_of(settings: JobSettings) -> int:
    """Return how many parameter servers the job takes."""
    exchange = parse_exchange(settings.exchange)
    return (settings.parameter_servers or exchange.servers) if exchange.has_servers else 0


def plan_of(settings: JobSettings, cuts: Sequence[int | str] | None = None) -> Plan:
    """Return the plan that the settings ask for; PlanError for what is not valid."""
    return Plan(
        stages=settings.stages,
        replicas=settings.replicas,
        tensor=settings.tensor,
        tensor_plan=settings.tensor_plan,
        transport=settings.transport,
        exchange=settings.exchange,
        every=settings.every,
        parameter_servers=settings.parameter_servers,
        staleness=settings.staleness,
        compression=settings.compression,
        zero=settings.zero,
        microbatches=settings.microbatches,
        schedule=settings.schedule,
        virtual_stages=settings.virtual_stages,
        recompute=settings.recompute,
        activation_compression=settings.activation_compression,
        window=settings.window,
        stall_seconds=settings.stall_seconds,
        cuts=cuts,
    )


def write_toml(values: Mapping[str, Any]) -> str:
    """Return flat settings as TOML; what is None is left out."""
    return "".join(f"{name} = {_toml_value(value)}\n" for name, value in values.items() if value is not None)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    # TOML's basic strings escape as JSON's do.
    return json.dumps(str(value), ensure_ascii=False)
