"""Reports on runs, from what they left behind."""
