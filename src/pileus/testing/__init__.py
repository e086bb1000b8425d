"""Drivers for what guests and devices meet, to test ours, and a user's own, in memory."""
