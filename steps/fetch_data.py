"""Stub."""

STAGE = "fetch_data"
