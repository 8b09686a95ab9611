"""Probe: finds the blocks of a base that decide content and style."""
