"""Checkpoints that the harness makes itself: small models, altered and trained ones, adapters."""
