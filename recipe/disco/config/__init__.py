"""The config groups of this recipe, and the published results."""
