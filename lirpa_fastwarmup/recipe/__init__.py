"""The recipe of "Fast Certified Robust Training with Short Warmup", a file a remedy."""
