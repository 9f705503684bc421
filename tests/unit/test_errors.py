"""Every error crosses a real RPC as itself, with all its parts."""

from concurrent import futures

import grpc
import pytest

from gradwire_protocol import errors
from gradwire_protocol.channels import bind, open_channel
from gradwire_protocol.errors import ErrorInterceptor, GradwireError, from_rpc_error, from_status, to_status

CLASSES = sorted(
    (
        c
        for c in vars(errors).values()
        if isinstance(c, type) and issubclass(c, GradwireError) and c is not GradwireError
    ),
    key=lambda c: c.__name__,
)


@pytest.fixture(scope="module")
def raising():
    """A server with one method of each shape, which raise what `raising.error` holds; and a channel to it."""

    class Behaviour:
        error: BaseException = RuntimeError()

        def unary(self, request, context):
            raise self.error

        def streaming(self, request, context):
            yield b"first"
            raise self.error

    behaviour = Behaviour()
    server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=(ErrorInterceptor(),))
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "t.T",
                {
                    "UU": grpc.unary_unary_rpc_method_handler(behaviour.unary),
                    "US": grpc.unary_stream_rpc_method_handler(behaviour.streaming),
                    "SU": grpc.stream_unary_rpc_method_handler(behaviour.unary),
                    "SS": grpc.stream_stream_rpc_method_handler(behaviour.streaming),
                },
            ),
        )
    )
    address = bind(server, "127.0.0.1:0")
    server.start()
    with open_channel(address) as channel:
        behaviour.calls = {
            "UU": lambda: channel.unary_unary("/t.T/UU")(b""),
            "US": lambda: list(channel.unary_stream("/t.T/US")(b"")),
            "SU": lambda: channel.stream_unary("/t.T/SU")(iter([b""])),
            "SS": lambda: list(channel.stream_stream("/t.T/SS")(iter([b""]))),
        }
        yield behaviour
    server.stop(None).wait()


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("shape", ["UU", "US", "SU", "SS"])
def test_errors_cross_every_kind_of_call(raising, kind, shape):
    raising.error = kind("What happened — with ünicode", expected="a", got="b", remedy="c")
    with pytest.raises(grpc.RpcError) as caught:
        raising.calls[shape]()
    restored = from_rpc_error(caught.value)
    assert type(restored) is kind
    assert str(restored) == str(raising.error)


def test_unforeseen_errors_become_internal_with_their_text(raising):
    raising.error = KeyError("lost")
    with pytest.raises(grpc.RpcError) as caught:
        raising.calls["UU"]()
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    restored = from_rpc_error(caught.value)
    assert isinstance(restored, errors.InternalError)
    assert "KeyError" in str(restored)


def test_long_texts_fit_the_metadata_that_carries_them(raising):
    raising.error = errors.PlanError("m" * 100_000, expected="e" * 100_000, got="g" * 100_000, remedy="r" * 100_000)
    with pytest.raises(grpc.RpcError) as caught:
        raising.calls["UU"]()
    assert isinstance(from_rpc_error(caught.value), errors.PlanError)


def test_subclasses_travel_as_their_base():
    class Special(errors.PlanError):
        pass

    assert type(from_status(to_status(Special("x")))) is errors.PlanError


def test_nobody_listening_is_unreachable_and_names_the_target():
    with open_channel("127.0.0.1:1") as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/t.T/UU")(b"", timeout=5)
    error = from_rpc_error(caught.value, target="coordinator at 127.0.0.1:1")
    assert isinstance(error, errors.Unreachable)
    assert "coordinator at 127.0.0.1:1" in str(error)
    assert error.remedy


def test_text_of_an_error():
    error = GradwireError("Too few.", expected="3", got="2", remedy="add one")
    assert str(error) == "Too few. Expected: 3. Got: 2. Remedy: add one."


def test_a_call_cancelled_while_a_status_was_on_its_way_was_cancelled() -> None:
    """grpc_status refuses such a call, whose code and status differ."""
    status = to_status(errors.PlanError("too late"))

    class Call(grpc.RpcError, grpc.Call):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.CANCELLED

        def details(self) -> str:
            return "Locally cancelled by application!"

        def trailing_metadata(self) -> object:
            return (("grpc-status-details-bin", status.SerializeToString()),)

    Call.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    error = from_rpc_error(Call(), target="the coordinator")
    assert type(error) is errors.Aborted
