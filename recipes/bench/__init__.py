"""Recipe of the benchmark's cases."""
