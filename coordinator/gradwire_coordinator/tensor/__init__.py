"""Splits a model's graphs over the tensor-parallel servers of a stage, on the graphs themselves: knows no torch."""
