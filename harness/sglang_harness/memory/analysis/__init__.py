"""Analysis of memory readings: leaks, settling, what explains a figure."""
