"""vhost-user: a device's queues served by another process, which is given the guest's memory and eventfds."""
