"""Measures that compare images: with small trained networks, without a network, or with models that the user names."""
