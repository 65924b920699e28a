"""What the rest stands on and that knows nothing of it: paths, files, signals, secrets, locks."""
