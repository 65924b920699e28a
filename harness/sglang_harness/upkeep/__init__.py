"""What outlives a run and what must not: kept servers, sweep, doctor."""
