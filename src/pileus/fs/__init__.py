"""A shared directory, spoken in FUSE: what a guest's kernel asks for, done below one directory of the host.

It knows nothing of queues and sockets: a request is bytes, and so is its reply.
"""
