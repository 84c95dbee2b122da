"""What training and the bounds look like."""
