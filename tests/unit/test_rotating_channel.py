"""A channel over certificates that change: new calls on new connections, calls in progress where they are."""

import queue
import time
from concurrent import futures
from contextlib import contextmanager
from datetime import timedelta

import grpc
import pytest

from gradwire.certs.authority import Authority
from gradwire.certs.members import issue
from gradwire_protocol.channels import bind, open_channel
from gradwire_protocol.credentials import OwnCertificate, channel_credentials
from gradwire_protocol.roles import Role, Served
from gradwire_protocol.service_names import service_name


def serial(context):
    return context.auth_context()["x509_pem_cert"][0]


class Calls:
    """What the server answers: the certificate that a call came with."""

    def service(self, details):
        handlers = {
            "/t.T/UU": grpc.unary_unary_rpc_method_handler(lambda request, context: serial(context)),
            "/t.T/SU": grpc.stream_unary_rpc_method_handler(lambda requests, context: serial(context)),
            "/t.T/US": grpc.unary_stream_rpc_method_handler(lambda request, context: iter([serial(context)])),
            "/t.T/SS": grpc.stream_stream_rpc_method_handler(self.stream),
        }
        return handlers.get(details.method)

    def stream(self, requests, context):
        for _ in requests:
            yield serial(context)


@contextmanager
def serving(files, address="127.0.0.1:0"):
    server = grpc.server(futures.ThreadPoolExecutor(8), options=(("grpc.so_reuseport", 0),))
    server.add_generic_rpc_handlers((Calls(),))
    bound = bind(server, address, files)
    server.start()
    try:
        yield bound
    finally:
        server.stop(None).wait()


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "authority")


def client(authority, life=timedelta(days=1)):
    return issue(authority, role=Role.CLIENT, name="client", life=life)


def server(authority, life=timedelta(days=1)):
    return issue(authority, role=Role.STAGE, name="server", addresses=["127.0.0.1"], life=life)


def own(files):
    return OwnCertificate(files).current().certificate


def test_calls_use_the_certificate_that_is_there_when_they_begin(authority):
    with serving(server(authority)) as address, open_channel(address, client(authority)) as channel:
        calls = (
            lambda: channel.unary_unary("/t.T/UU")(b"", timeout=10),
            lambda: channel.unary_unary("/t.T/UU").with_call(b"", timeout=10)[0],
            lambda: channel.unary_unary("/t.T/UU").future(b"", timeout=10).result(),
            lambda: channel.stream_unary("/t.T/SU")(iter([b""]), timeout=10),
            lambda: next(channel.unary_stream("/t.T/US")(b"", timeout=10)),
            lambda: next(channel.stream_stream("/t.T/SS")(iter([b""]), timeout=10)),
        )
        kept = channel.unary_unary("/t.T/UU")
        seen = set()
        for call in calls:
            files = client(authority)
            assert call() == own(files)
            assert kept(b"", timeout=10) == own(files)
            seen.add(own(files))
        assert len(seen) == len(calls)


def test_a_stream_stays_on_its_connection_and_that_ends_with_it(authority):
    with serving(server(authority)) as address:
        files = client(authority)
        first = own(files)
        with open_channel(address, files) as channel:
            requests = queue.SimpleQueue()
            stream = channel.stream_stream("/t.T/SS")(iter(requests.get, None), timeout=30)
            requests.put(b"")
            assert next(stream) == first
            second = own(client(authority))
            method = channel.unary_unary("/t.T/UU")
            assert method(b"", timeout=10) == second
            requests.put(b"")
            assert next(stream) == first
            assert len(channel._former) == 1
            requests.put(None)
            assert list(stream) == []
            deadline = time.monotonic() + 10
            while channel._former and time.monotonic() < deadline:
                method(b"", timeout=10)
            assert not channel._former


def test_failed_calls_hold_nothing(authority):
    with serving(server(authority)) as address, open_channel(address, client(authority)) as channel:
        for call in (
            lambda: channel.unary_unary("/t.T/None")(b"", timeout=10),
            lambda: channel.unary_unary("/t.T/None").future(b"", timeout=10).result(),
            lambda: list(channel.unary_stream("/t.T/None")(b"", timeout=10)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        deadline = time.monotonic() + 10
        while channel._connection.calls and time.monotonic() < deadline:
            time.sleep(0.01)
        assert channel._connection.calls == 0


def test_it_connects_again_after_its_first_certificate_has_ended(authority):
    """And gRPC's own channel does not."""
    short = timedelta(seconds=4)
    files = client(authority, short)
    with serving(server(authority)) as address:
        channel = open_channel(address, files)
        loaded = OwnCertificate(files).current()
        options = (
            ("grpc.ssl_target_name_override", service_name("127.0.0.1", Served.STAGE)),
            ("grpc.use_local_subchannel_pool", 1),
        )
        plain = grpc.secure_channel(address, channel_credentials(loaded), options=options)
        for each in (channel, plain):
            each.unary_unary("/t.T/UU")(b"", timeout=10)
    client(authority)
    server(authority)
    time.sleep(max(0.0, loaded.info.left().total_seconds() + 0.1))
    with serving(server(authority), address):
        assert channel.unary_unary("/t.T/UU")(b"", timeout=20, wait_for_ready=True) == own(files)
        with pytest.raises(grpc.RpcError):
            plain.unary_unary("/t.T/UU")(b"", timeout=2, wait_for_ready=True)
    channel.close()
    plain.close()


def test_a_server_shows_new_connections_its_new_certificate(authority):
    import ssl

    files = server(authority)
    with serving(files) as address:
        host, _, port = address.partition(":")

        def shown():
            return ssl.get_server_certificate((host, int(port)), timeout=10).encode()

        assert shown() in own(files)
        before = own(files)
        server(authority)
        assert own(files) != before
        assert shown() in own(files)


def test_an_authority_that_is_replaced_loses_nobody(authority):
    """Neither who has the new files talking to who has the old ones, nor the other way round."""
    folder = authority.directory
    old_client = issue(authority, role=Role.CLIENT, name="old", folder=folder / "old-client")
    old_server = issue(authority, role=Role.STAGE, name="old", addresses=["127.0.0.1"], folder=folder / "old-server")
    newer = Authority.open(folder).renewed()
    assert newer.fingerprint != authority.fingerprint
    new_client = issue(newer, role=Role.CLIENT, name="new", folder=folder / "new-client")
    new_server = issue(newer, role=Role.STAGE, name="new", addresses=["127.0.0.1"], folder=folder / "new-server")
    for server_files in (old_server, new_server):
        with serving(server_files) as address:
            for client_files in (old_client, new_client):
                with open_channel(address, client_files) as channel:
                    channel.unary_unary("/t.T/UU")(b"", timeout=10)
    alone = Authority.open(folder).without_former()
    strict = issue(alone, role=Role.STAGE, name="strict", addresses=["127.0.0.1"])
    with serving(strict) as address:
        with open_channel(address, old_client) as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary("/t.T/UU")(b"", timeout=10)
        with open_channel(address, issue(alone, role=Role.CLIENT, name="c")) as channel:
            channel.unary_unary("/t.T/UU")(b"", timeout=10)
