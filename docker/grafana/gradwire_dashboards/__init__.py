"""Grafana's dashboards for a cluster: one file each, and panels.py, which says what all of their panels look like."""
