from collections.abc import Iterator

import pytest

from tests.unit.net.namespace import Namespace


@pytest.fixture
def host() -> Iterator[Namespace]:
    """The host, as far as its network goes; nothing may be left in it."""
    with Namespace() as namespace:
        yield namespace
