"""Checkpoints on disk: a directory of safetensors files and a manifest, whole or not there at all. Never a pickle."""
