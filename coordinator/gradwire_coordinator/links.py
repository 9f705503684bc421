"""What is done with all servers of a run at the same time: preparing them, and freeing them again.

Leaves to others: the line to one server (`link.py`), and what failures mean for the run (`run.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import structlog

from gradwire_coordinator.link import Link
from gradwire_protocol.errors import GradwireError, Unreachable
from gradwire_protocol.v1 import stage_pb2

_log = structlog.get_logger(__name__)


def prepare_all(
    links: Sequence[Link], requests: Sequence[stage_pb2.PrepareRequest], on_lost: Callable[[str], None]
) -> list[stage_pb2.PrepareReply]:
    """Prepare every server; return the replies, or raise the first failure, by position.

    on_lost: gets servers that do not answer.
    """
    with ThreadPoolExecutor(len(links), thread_name_prefix="prepare") as pool:
        calls = [pool.submit(link.prepare, request) for link, request in zip(links, requests, strict=True)]
        ends = [(link, call.exception()) for link, call in zip(links, calls, strict=True)]
    for link, error in ends:
        if isinstance(error, Unreachable):
            on_lost(link.server)
    for link, error in ends:
        if error is None:
            continue
        if isinstance(error, GradwireError):
            error = type(error)(
                f"Cannot prepare {link.target}: {error.message}",
                expected=error.expected,
                got=error.got,
                remedy=error.remedy,
            )
        raise error
    return [call.result() for call in calls]


def release_all(links: Sequence[Link], run: str, generation: int, reason: str) -> None:
    """Free every server, and close the lines to them; one that does not answer is freed by its broken stream."""

    def release(link: Link) -> None:
        error = link.release(run, generation, reason)
        if error is not None:
            _log.warning("server not released", run=run, server=link.server, error=str(error))
        link.close()

    with ThreadPoolExecutor(len(links), thread_name_prefix="release") as pool:
        list(pool.map(release, links))
