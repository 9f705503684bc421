"""Checkpoints on disk: a directory of safetensors files and a manifest, whole or not there at all. Never a pickle.

Knows no torch: whoever has tensors hands in their bytes (torch_tensors.raw_tensor).
"""
