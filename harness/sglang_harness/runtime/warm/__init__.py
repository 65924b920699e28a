"""Warm starts: servers forked from a parent process that has imported SGLang already."""
