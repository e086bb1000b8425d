"""What scripts/* do, in Python's standard library alone: they run before anything is installed."""
