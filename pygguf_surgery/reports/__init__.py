"""What became of a model: comparison, verification, pictures."""
