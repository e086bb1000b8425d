"""Virtqueues: rings in guest memory, checked. See ``_queue`` for the theory and ``_engine`` for threads."""

from pileus.virtio.queue._queue import RING_FEATURES, Chain, Queue

__all__ = ["RING_FEATURES", "Chain", "Queue"]
