"""How the benchmark's cases were made."""
