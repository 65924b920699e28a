"""Checks of what a server must survive: each on a server of its own."""
