"""Typed errors, and their one translation to and from RPC status.

Every error says what was expected, what was got, and the remedy. On the wire an error is a
`google.rpc.Status` whose `ErrorInfo` carries these parts; `ErrorInterceptor` writes it around every
RPC of a server, `from_rpc_error` restores the same class at the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "gradwire"
_PARTS = ("expected", "got", "remedy")
# gRPC refuses metadata above 8 KiB; the status travels in it, base64-encoded, besides its plain message.
_MESSAGE_LIMIT = 1500
_PART_LIMIT = 700

_log = structlog.get_logger(__name__)


class GradwireError(Exception):
    """Base of all errors that Gradwire raises on purpose."""

    def __init__(self, message: str, *, expected: str = "", got: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.expected = expected
        self.got = got
        self.remedy = remedy

    def __str__(self) -> str:
        parts = [self.message.rstrip(".")]
        parts += [f"{name.capitalize()}: {getattr(self, name).rstrip('.')}" for name in _PARTS if getattr(self, name)]
        return ". ".join(parts) + "."


class ModelError(GradwireError):
    """The model cannot be exported, or its graph holds something that is not allowed."""


class PlanError(GradwireError):
    """The plan cannot be carried out: with this model, these servers, or this version."""


class BatchError(GradwireError):
    """A batch does not fit the example that the run was made with."""


class OptimizerError(GradwireError):
    """The optimizer cannot be carried over to the servers."""


class SettingsError(GradwireError):
    """A flag, environment variable, settings file or address is wrong."""


class DataError(GradwireError):
    """Training data or weights cannot be read, do not fit, or are too few."""


class CheckpointError(GradwireError):
    """A checkpoint cannot be written, or is not whole, or does not fit the model."""


class FrameError(GradwireError):
    """A message is malformed."""


class LimitExceeded(GradwireError):
    """A size or count is above a limit of the receiver."""


class RunNotFound(GradwireError):
    """No such run or server is known here."""


class ServerBusy(GradwireError):
    """The server is held by another run."""


class StaleGeneration(GradwireError):
    """The message belongs to another run or generation than the one that is prepared here."""


class StageFailed(GradwireError):
    """A stage server failed or was lost; the run has ended."""


class Stalled(GradwireError):
    """What a run waited for made no progress for longer than its plan allows; the run has ended."""


class Aborted(GradwireError):
    """The run was released while something waited for it."""


class Stopping(GradwireError):
    """The run is to end, since one of those that carry it out was asked to stop; its state is between two steps."""


class Unreachable(GradwireError):
    """A service does not answer at its address."""


class NotAllowed(GradwireError):
    """The caller's certificate, or join token, does not allow the call."""


class InternalError(GradwireError):
    """Something went wrong that Gradwire did not foresee: please report it."""


# The one table: class, status code, reason (the class's stable name on the wire).
_TABLE: tuple[tuple[type[GradwireError], grpc.StatusCode, str], ...] = (
    (ModelError, grpc.StatusCode.INVALID_ARGUMENT, "MODEL"),
    (PlanError, grpc.StatusCode.FAILED_PRECONDITION, "PLAN"),
    (BatchError, grpc.StatusCode.INVALID_ARGUMENT, "BATCH"),
    (OptimizerError, grpc.StatusCode.INVALID_ARGUMENT, "OPTIMIZER"),
    (SettingsError, grpc.StatusCode.INVALID_ARGUMENT, "SETTINGS"),
    (DataError, grpc.StatusCode.INVALID_ARGUMENT, "DATA"),
    (CheckpointError, grpc.StatusCode.FAILED_PRECONDITION, "CHECKPOINT"),
    (FrameError, grpc.StatusCode.INVALID_ARGUMENT, "FRAME"),
    (LimitExceeded, grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT"),
    (RunNotFound, grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    (ServerBusy, grpc.StatusCode.FAILED_PRECONDITION, "SERVER_BUSY"),
    (StaleGeneration, grpc.StatusCode.FAILED_PRECONDITION, "STALE_GENERATION"),
    (StageFailed, grpc.StatusCode.ABORTED, "STAGE_FAILED"),
    (Stalled, grpc.StatusCode.ABORTED, "STALLED"),
    (Aborted, grpc.StatusCode.ABORTED, "ABORTED"),
    (Stopping, grpc.StatusCode.UNAVAILABLE, "STOPPING"),
    (Unreachable, grpc.StatusCode.UNAVAILABLE, "UNREACHABLE"),
    (NotAllowed, grpc.StatusCode.PERMISSION_DENIED, "NOT_ALLOWED"),
    (InternalError, grpc.StatusCode.INTERNAL, "INTERNAL"),
)
_CODES = {error: code for error, code, _ in _TABLE}
_REASONS = {error: reason for error, _, reason in _TABLE}
_CLASSES = {reason: error for error, _, reason in _TABLE}


_REMEDY = "check that the service runs, that the address is right, and that both sides agree on TLS"
# What BoringSSL and gRPC say of a handshake that failed here, and what to do. The other side says nothing but this.
_TLS_REMEDIES = (
    ("WRONG_VERSION_NUMBER", "it speaks plaintext, and this side TLS: give both the same kind of settings"),
    (
        "Hostname Verification",
        "its certificate is not for this address, or not for this kind of service: see `gradwire certs show`, and "
        "issue one with this --address and the right --role",
    ),
    ("certificate has expired", "its certificate has ended: issue another with `gradwire certs rotate`"),
    ("certificate is not yet valid", "its certificate is not valid yet: check the clocks of both machines"),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "its authority is not one in --tls-authority: give both sides the same",
    ),
)


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def to_status(error: GradwireError) -> status_pb2.Status:
    """Return the status that carries `error` over the wire."""
    kind = next(base for base in type(error).__mro__ if base in _CODES)
    metadata = {name: _shortened(getattr(error, name), _PART_LIMIT) for name in _PARTS if getattr(error, name)}
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=_REASONS[kind], domain=DOMAIN, metadata=metadata))
    code = code_pb2.Code.Value(_CODES[kind].name)
    return status_pb2.Status(code=code, message=_shortened(error.message, _MESSAGE_LIMIT), details=[detail])


def from_status(status: status_pb2.Status) -> GradwireError | None:
    """Restore the error that a status carries; None if it is not one of ours."""
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in _CLASSES:
            parts = {name: info.metadata[name] for name in _PARTS if name in info.metadata}
            return _CLASSES[info.reason](status.message, **parts)
    return None


def status_of(call: Any) -> status_pb2.Status | None:
    """Return the status that the other side ended a call with; None if it sent none."""
    try:
        status: status_pb2.Status | None = rpc_status.from_call(call)
    except ValueError:
        # The call was cancelled here while that status was on its way: the cancellation counts.
        return None
    return status


def from_rpc_error(error: grpc.RpcError, *, target: str = "") -> GradwireError:
    """Restore the typed error of a failed call.

    `target` names the service called ("coordinator at 127.0.0.1:7070"), for errors that never reached it.
    """
    # Every RpcError of a call is a grpc.Call as well; bare ones come from code outside gRPC.
    if not isinstance(error, grpc.Call):
        return InternalError(f"A call to {target or 'a service'} failed: {error!r}")
    status = status_of(error)
    restored = from_status(status) if status is not None else None
    if restored is not None:
        return restored
    code, details = error.code(), error.details() or ""
    where = target or "the service"
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unreachable(
            f"Cannot reach {where}",
            got=details,
            remedy=next((remedy for sign, remedy in _TLS_REMEDIES if sign in details), _REMEDY),
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Unreachable(
            f"No answer from {where} in time", got=details, remedy="check whether it is stopped or overloaded"
        )
    if code is grpc.StatusCode.CANCELLED:
        return Aborted(f"The call to {where} was cancelled", got=details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return LimitExceeded(f"{where} refused a message", got=details)
    return InternalError(f"A call to {where} failed with {code.name}", got=details)


class ErrorInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]  # grpcio has no type information
    """Ends an RPC whose handler raises with the status of the error; nothing is swallowed."""

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler = continuation(details)
        if handler is None:
            return None
        wrap = _streaming if handler.response_streaming else _unary
        return with_behaviour(handler, lambda behaviour: wrap(behaviour, details.method))


def with_behaviour(handler: Any, wrap: Callable[[Any], Any]) -> Any:
    """Return a method's handler with another in place of its behaviour, which `wrap` makes of it."""
    if handler.request_streaming and handler.response_streaming:
        make, behaviour = grpc.stream_stream_rpc_method_handler, handler.stream_stream
    elif handler.request_streaming:
        make, behaviour = grpc.stream_unary_rpc_method_handler, handler.stream_unary
    elif handler.response_streaming:
        make, behaviour = grpc.unary_stream_rpc_method_handler, handler.unary_stream
    else:
        make, behaviour = grpc.unary_unary_rpc_method_handler, handler.unary_unary
    return make(
        wrap(behaviour),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def _unary(behaviour: Callable[[Any, Any], Any], method: str) -> Callable[[Any, Any], Any]:
    def call(request: Any, context: Any) -> Any:
        try:
            return behaviour(request, context)
        except Exception as error:  # noqa: BLE001  # the one translator: every error becomes a status
            _abort(context, error, method)

    return call


def _streaming(behaviour: Callable[[Any, Any], Iterator[Any]], method: str) -> Callable[[Any, Any], Iterator[Any]]:
    def call(request: Any, context: Any) -> Iterator[Any]:
        try:
            yield from behaviour(request, context)
        except Exception as error:  # noqa: BLE001  # the one translator: every error becomes a status
            _abort(context, error, method)

    return call


def _abort(context: Any, error: Exception, method: str) -> NoReturn:
    if isinstance(error, grpc.RpcError):
        # The client of this stream went away, or a call that the handler made failed.
        error = from_rpc_error(error)
    if context.code() is not None:
        # The handler has ended the call with a status of its own (health service).
        raise error
    if not isinstance(error, GradwireError):
        _log.error("unforeseen error in a call", method=method, exc_info=error)
        error = InternalError(
            f"{method} failed: {type(error).__name__}: {error}", remedy="see the server's log; please report it"
        )
    context.abort_with_status(rpc_status.to_status(to_status(error)))
    raise error  # abort_with_status has raised already; this tells type checkers
