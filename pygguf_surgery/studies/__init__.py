"""What reads data before a plan is made: calibration, rankings, repairs, types for a size."""
