"""Certificates of a cluster: a development authority, what it issues, and how new members get theirs."""
