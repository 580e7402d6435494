"""Stub."""

STAGE = "evaluate_model"
