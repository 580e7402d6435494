"""Stub."""

STAGE = "merge_adapter"
