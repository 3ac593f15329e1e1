"""Tensor types: their facts, and arrays in them."""
