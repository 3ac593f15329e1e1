"""One file per edit: pure functions from tensors and metadata to the same."""
