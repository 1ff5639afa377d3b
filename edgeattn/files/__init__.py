"""Files: what is stored, and readers of what other tools write."""
