"""Tells, with evidence, whether an SGLang server can be trusted."""

__version__ = "0.1.0"
