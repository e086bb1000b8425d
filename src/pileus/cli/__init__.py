"""The command line: ``options`` is its table, ``args`` reads it, ``main`` runs what it says."""
