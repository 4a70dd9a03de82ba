"""What decodes a model of the same dimensions: ours, its limit, and what others would use."""
