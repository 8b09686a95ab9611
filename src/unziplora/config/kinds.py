"""The two LoRAs that a picture is split into."""

KINDS = ("content", "style")
"""By name, in the order in which they choose columns."""
