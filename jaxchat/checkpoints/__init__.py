"""Models on disk: what is at a path, its parameters layer by layer, loading and writing them."""
