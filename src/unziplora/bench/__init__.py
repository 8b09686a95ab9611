"""Benchmark: methods compared with images that show the right result."""
