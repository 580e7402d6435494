"""Stub."""

STAGE = "format_prompts"
