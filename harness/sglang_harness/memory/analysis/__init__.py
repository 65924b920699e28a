"""What a series of readings says: leaks, steady states, what explains a figure."""
