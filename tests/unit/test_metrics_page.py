"""/metrics: what it shows, and that nobody keeps others from it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from gradwire_protocol import metrics_page
from gradwire_protocol.metrics_page import MetricsPage


@pytest.fixture
def page() -> Iterator[MetricsPage]:
    registry = CollectorRegistry()
    Counter("seen", "Seen.", registry=registry).inc(3)
    made = MetricsPage("127.0.0.1", 0, registry)
    yield made
    made.close()


def scrape(page: MetricsPage) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{page.server_port}/metrics", timeout=5) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text: str = answer.read().decode()
    return text


def connected(page: MetricsPage) -> socket.socket:
    return socket.create_connection(("127.0.0.1", page.server_port), timeout=5)


def ended(connection: socket.socket) -> bool:
    """Whether the page has ended a connection, within its timeout."""
    try:
        return connection.recv(1000) == b""
    except ConnectionError:
        return True


def page_threads() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def test_it_shows_the_registry(page: MetricsPage) -> None:
    assert "seen_total 3.0\n" in scrape(page)


def test_whoever_holds_connections_keeps_no_scrape_out(page: MetricsPage) -> None:
    strangers = []
    for index in range(300):
        strangers.append(connected(page))
        strangers[-1].sendall(b"GET /metrics HTTP/1.1\r\nX: y" if index % 2 else b"")
        if index % 50 == 0:
            assert "seen_total" in scrape(page)
            assert page_threads() <= metrics_page._MAXIMUM_CONNECTIONS
    assert "seen_total" in scrape(page)
    assert all(ended(stranger) for stranger in strangers[:100])
    for stranger in strangers:
        stranger.close()


def test_a_connection_ends_in_time_whatever_comes_on_it(page: MetricsPage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_page, "_CONNECTION_SECONDS", 1.0)
    with connected(page) as slow:
        began = time.monotonic()
        slow.settimeout(0.05)
        while time.monotonic() - began < 5:
            slow.sendall(b"G")
            with contextlib.suppress(TimeoutError):
                assert ended(slow)
                break
        assert 1 <= time.monotonic() - began < 4
    assert "seen_total" in scrape(page)


def test_it_ends_with_its_connections() -> None:
    page = MetricsPage("127.0.0.1", 0, CollectorRegistry())
    with connected(page) as one:
        time.sleep(0.1)
        page.close()
        assert ended(one)
    with pytest.raises(ConnectionRefusedError):
        connected(page)


def test_a_busy_port_is_told(page: MetricsPage) -> None:
    with pytest.raises(OSError, match="in use"):
        MetricsPage("127.0.0.1", page.server_port, CollectorRegistry())


def test_ipv6() -> None:
    page = MetricsPage("::1", 0, CollectorRegistry())
    try:
        with urllib.request.urlopen(f"http://[::1]:{page.server_port}/metrics", timeout=5) as answer:
            assert answer.status == 200
    finally:
        page.close()
