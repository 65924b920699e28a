"""Host memory of a server: of its container or of its processes."""
