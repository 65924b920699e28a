"""What several checks share; no check is in here."""
