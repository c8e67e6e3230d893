"""Training: fixed features and the heads solved on them, or the whole network, stepped; no objective's mathematics."""
