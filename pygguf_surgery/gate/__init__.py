"""The check that every plan passes, and the jobs that it becomes."""
