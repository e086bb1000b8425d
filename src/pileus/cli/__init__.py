"""The command line: ``options`` is its table, ``args`` and ``build`` read it, ``main`` runs what it says."""
