"""What several checks share; there are no checks in here."""
