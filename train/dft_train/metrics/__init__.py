"""What is measured: exact `sums`, the run's `journal`, and where they are shown (`console`, `trackers`)."""
