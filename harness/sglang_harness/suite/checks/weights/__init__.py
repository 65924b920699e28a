"""Checks of pushed weights."""
