"""Which servers can run a model's custom operators: those that have each of them, with the same schema.

Operators are mappings from target to schema. Code never travels: client and servers have imported it themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from gradwire_protocol.errors import GradwireError, LimitExceeded, ModelError
from gradwire_protocol.operators import (
    MAXIMUM_CUSTOM_OPERATORS,
    MAXIMUM_SCHEMA_BYTES,
    MAXIMUM_TARGET_BYTES,
    is_custom,
)
from gradwire_protocol.v1 import graph_pb2

_MOST_SERVERS_NAMED = 8
_SHOWN_CHARACTERS = 500


def read_operators(
    operators: Sequence[graph_pb2.CustomOperator], whose: str, error: type[GradwireError]
) -> dict[str, str]:
    """Check a list that came over the wire, and return it; LimitExceeded, or `error` for one that is none."""
    if len(operators) > MAXIMUM_CUSTOM_OPERATORS:
        raise LimitExceeded(
            f"{whose} has too many custom operators",
            expected=f"at most {MAXIMUM_CUSTOM_OPERATORS}",
            got=str(len(operators)),
        )
    read: dict[str, str] = {}
    for operator in operators:
        target, schema = operator.target, operator.schema
        if (
            not is_custom(target)
            or target in read
            or len(target.encode()) > MAXIMUM_TARGET_BYTES
            or not 1 <= len(schema.encode()) <= MAXIMUM_SCHEMA_BYTES
        ):
            raise error(
                f"{whose} has a custom operator that is none, or is there twice",
                expected=f"a name outside of torch, of at most {MAXIMUM_TARGET_BYTES} bytes, with a schema of 1 to "
                f"{MAXIMUM_SCHEMA_BYTES}",
                got=repr(target[:80]),
            )
        read[target] = schema
    return read


def can_run(known: Mapping[str, str], needed: Mapping[str, str]) -> bool:
    """Whether a server that knows some operators has all that are needed."""
    return all(known.get(target) == schema for target, schema in needed.items())


def cannot_run(needed: Mapping[str, str], servers: Iterable[tuple[str, Mapping[str, str]]]) -> ModelError:
    """Return the error for servers, by name, of which none has all that is needed: names the first operator amiss."""
    given = list(servers)
    for target, schema in needed.items():
        without = [server for server, known in given if target not in known]
        if without:
            return ModelError(
                f"Custom operator {target} is not known to {_named(without)}",
                expected="stage servers that were started with the module that defines it",
                got=", ".join(sorted(set().union(*(known for _, known in given))))[:_SHOWN_CHARACTERS]
                or "no custom operators",
                remedy="start them with --operators MODULE; on one machine gradwire.local(operators=[…]) or "
                "gradwire up --operators",
            )
        other = {server: known[target] for server, known in given if known[target] != schema}
        if other:
            return ModelError(
                f"Custom operator {target} has another schema on {_named(list(other))}",
                expected=schema[:_SHOWN_CHARACTERS],
                got=next(iter(other.values()))[:_SHOWN_CHARACTERS],
                remedy="use the same version of its module for the script and for the stage servers",
            )
    return ModelError("No stage server has all of the model's custom operators", expected=", ".join(needed)[:500])


def _named(servers: Sequence[str]) -> str:
    more = len(servers) - _MOST_SERVERS_NAMED
    named = ", ".join(servers[:_MOST_SERVERS_NAMED]) + (f" and {more} more" if more > 0 else "")
    return f"stage server{'s' if len(servers) > 1 else ''} {named}"
