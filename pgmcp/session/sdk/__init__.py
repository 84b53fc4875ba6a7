"""What pgmcp puts into servers of the official SDK: shared subscriptions, shared keys, requests without a session."""
