"""Reports. Each is made from a verdict alone."""
