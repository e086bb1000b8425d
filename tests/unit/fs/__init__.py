"""Shared directories."""
