"""From files on the host to a guest that is ready to run: see :func:`pileus.boot.loader.load`."""
