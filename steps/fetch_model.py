"""Stub."""

STAGE = "fetch_model"
