"""Checks of memory: readings, release and resume, colocated training."""
