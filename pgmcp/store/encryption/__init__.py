"""Keys that all nodes share, and what is sealed with them while it lies in the tables."""
