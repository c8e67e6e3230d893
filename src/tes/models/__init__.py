"""Pre-trained networks: building them, loading their weights strictly, and how their images were prepared."""
