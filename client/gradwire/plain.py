"""Protobuf messages as plain dicts for JSON: every field under its own name, 64-bit numbers as numbers."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message


def to_plain(message: Message) -> dict[str, Any]:
    """Return all fields; those that can be absent, and are, as None. Enums become their names. No maps."""
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        return [_value(item, field) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _value(value, field)


def _value(value: Any, field: Any) -> Any:
    if isinstance(value, Message):
        return to_plain(value)
    return field.enum_type.values_by_number[value].name if field.enum_type is not None else value
