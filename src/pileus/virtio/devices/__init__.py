"""The devices, one a module."""
