"""Codecs: how tensors are made smaller for the wire. One file each; registry.py finds them by number.

Pure functions of tensors, on whatever device these are, for anything that travels. Names, numbers and sizes are in
gradwire_protocol.codecs; the byte layouts are specified beside the Codec enum in tensors.proto.
"""
