"""What process tests are made of: nodes, a load balancer, the conformance suite and clients."""
