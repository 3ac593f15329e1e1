"""The plan as plain data."""
