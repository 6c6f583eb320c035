"""What a subnet is worth: batch-norm statistics from images, accuracy."""
