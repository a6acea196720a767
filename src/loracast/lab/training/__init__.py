"""Training: the loop, the objectives, and sources that draw the episodes of each step from a recipe."""
