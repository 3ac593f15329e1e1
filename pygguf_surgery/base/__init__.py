"""What everything else leans on: errors, units, words, progress."""
