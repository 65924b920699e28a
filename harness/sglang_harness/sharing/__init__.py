"""One server for a whole pytest session, and for all workers of pytest-xdist."""
