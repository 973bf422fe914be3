"""What can go wrong within a step, found and decided by all ranks alike: `step` calls the others."""
