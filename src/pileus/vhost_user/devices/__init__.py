"""Devices whose queues are served by a vhost-user back-end."""
