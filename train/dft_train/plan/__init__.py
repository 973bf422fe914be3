"""What a run is going to do, and the memory it takes, before it does it: `forecast`, from `memory` and `shape`."""
