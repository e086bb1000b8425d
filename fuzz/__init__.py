"""Hostile input in bulk; each script opens with its invariant."""
