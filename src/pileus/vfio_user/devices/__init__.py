"""Devices to run in a process of their own."""
