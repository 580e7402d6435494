"""Stub."""

STAGE = "compare_runs"
