"""A training run: setup, the loop, the step, the optimizer, and what a run writes."""
