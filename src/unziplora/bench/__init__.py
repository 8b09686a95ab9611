"""The benchmark: methods against pictures that show what they should have made."""
