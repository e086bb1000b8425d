"""Virtio 1.x: devices, the queues they serve, and the transports that carry them."""
