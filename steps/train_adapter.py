"""Stub."""

STAGE = "train_adapter"
