"""What the training scripts share, one subject a file."""
