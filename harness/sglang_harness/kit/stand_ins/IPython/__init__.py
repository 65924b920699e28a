"""Stands in for IPython, which SGLang imports to show videos in notebooks: a server never does."""

__version__ = "0.0.0+stand.in"
