"""Addresses, the plaintext rule, and mutual TLS over a real connection."""

from concurrent import futures

import grpc
import pytest

from gradwire.certs.authority import Authority
from gradwire.certs.members import issue
from gradwire_protocol.channels import bind, check_plaintext, is_loopback, open_channel, parse_address
from gradwire_protocol.errors import SettingsError
from gradwire_protocol.roles import Role
from gradwire_protocol.tls_files import TlsFiles


@pytest.mark.parametrize(
    ("text", "parts"),
    [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:0", ("::1", 0)), ("gpu-7.lab:7070", ("gpu-7.lab", 7070))],
)
def test_addresses_parse(text, parts):
    assert parse_address(text) == parts


@pytest.mark.parametrize("text", ["", "host", ":80", "host:", "host:99999", "host:-1", "a b:1", "::1:80", "http://a:1"])
def test_other_text_is_refused(text):
    with pytest.raises(SettingsError, match="Not an address"):
        parse_address(text)


def test_plaintext_is_for_loopback_only():
    assert is_loopback("127.0.0.5:1")
    assert is_loopback("localhost:1")
    assert is_loopback("[::1]:1")
    assert not is_loopback("10.0.0.1:1")
    assert not is_loopback("example.org:1")
    check_plaintext("127.0.0.1:1", None)
    check_plaintext("10.0.0.1:1", None, insecure=True)
    with pytest.raises(SettingsError, match="loopback only"):
        check_plaintext("0.0.0.0:7070", None)
    with pytest.raises(SettingsError, match="loopback only"):
        open_channel("10.0.0.1:7070")


def echo_server(tls):
    server = grpc.server(futures.ThreadPoolExecutor(2))
    handler = grpc.unary_unary_rpc_method_handler(lambda request, _: request)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", {"Echo": handler}),))
    address = bind(server, "127.0.0.1:0", tls)
    server.start()
    return server, address


def test_mutual_tls_admits_only_certificates_of_the_same_authority(tmp_path):
    ours, theirs = Authority.create(tmp_path / "ours"), Authority.create(tmp_path / "theirs")
    server, address = echo_server(issue(ours, role=Role.STAGE, name="server", addresses=["127.0.0.1"]))
    try:
        with open_channel(address, issue(ours, role=Role.CLIENT, name="client")) as channel:
            assert channel.unary_unary("/t.T/Echo")(b"hello", timeout=10) == b"hello"
        for tls in (issue(theirs, role=Role.CLIENT, name="stranger"), None):
            with open_channel(address, tls) as channel, pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/t.T/Echo")(b"hello", timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        server.stop(None).wait()


def test_missing_tls_files_and_busy_ports_are_named(tmp_path):
    missing = TlsFiles(authority=tmp_path / "a", certificate=tmp_path / "b", key=tmp_path / "c")
    with pytest.raises(SettingsError, match="Cannot read the TLS file"):
        open_channel("127.0.0.1:1", missing)
    server, address = echo_server(None)
    try:
        with pytest.raises(SettingsError, match="Cannot listen on"):
            bind(grpc.server(futures.ThreadPoolExecutor(1), options=(("grpc.so_reuseport", 0),)), address)
    finally:
        server.stop(None).wait()
