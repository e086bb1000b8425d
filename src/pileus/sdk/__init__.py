"""For Python programs: ``client`` speaks to a running VMM, ``vm`` runs one; ``pileus`` has the names."""
