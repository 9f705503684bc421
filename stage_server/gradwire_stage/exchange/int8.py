"""int8 for gradients: blocks of 256 elements with a scale each, as activations have (`gradwire_stage.codecs.int8`)."""

from __future__ import annotations

from gradwire_stage.codecs import int8
from gradwire_stage.exchange.element_codec import ElementCodec

INT8 = ElementCodec("int8", int8.encode, int8.decode, element_bytes=1)
