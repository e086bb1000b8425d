"""The HTTP API on a Unix socket; nothing of it is imported unless a socket is asked for.

``server`` and ``connection`` speak HTTP, ``routes`` is the table of what can be asked, ``generations`` turns
the bodies of two generations of clients into one, and ``openapi`` describes it all.
"""
