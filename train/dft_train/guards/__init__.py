"""The model's own words against ours, at the start of a run: the loss and the packing, at the first batch."""
