"""Hydra configuration files that this package adds to verl's own."""
