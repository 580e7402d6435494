"""Stub."""

STAGE = "tokenize_splits"
