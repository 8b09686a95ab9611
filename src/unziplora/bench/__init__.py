"""The benchmark with ground truth: what pictures are compared by, and how well."""
