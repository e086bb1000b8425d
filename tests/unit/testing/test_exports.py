"""The public surface of pileus.testing."""

import pileus.testing


def test_the_public_names_are_these() -> None:
    assert sorted(pileus.testing.__all__) == [
        "F_INDIRECT",
        "F_NEXT",
        "F_WRITE",
        "FakeDriver",
        "Heap",
        "Ring",
        "Scrambled",
        "Used",
        "make_memory",
    ]
    assert all(hasattr(pileus.testing, name) for name in pileus.testing.__all__)
