"""Training: fixed features and the heads solved on them, or the whole network, stepped. Knows no objective by name."""
