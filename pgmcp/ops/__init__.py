"""What operators and balancers ask a node: health."""
