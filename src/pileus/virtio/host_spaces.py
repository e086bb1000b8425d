"""Devices of the host behind the virtual IOMMU: the host's IOMMU is kept to what the guest's driver says."""

import errno

from pileus import log
from pileus.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Protocol

    from pileus.memory._iommu import Domain, Endpoint, Iommu

    class HostSpace(Protocol):
        """What such a device sees. See vfio.container."""

        last: int  # address that can be mapped

        def open_all(self) -> None:
            """All memory, where the guest sees it. Raises HostError."""

        def map(self, first: int, last: int, gpa: int, access: int) -> None:
            """Raises OSError, with part of it mapped."""

        def unmap(self, first: int, last: int) -> None:
            """All that was mapped there."""


class HostSpaces:
    """The spaces of endpoints of ``core``. What fails is -errno, as for ``core`` itself."""

    def __init__(self, core: "Iommu") -> None:
        self._core = core
        self._spaces: dict[int, HostSpace] = {}  # by the numbers of their endpoints
        self.last = (1 << 64) - 1  # address that all of them can map

    def add(self, endpoint: "Endpoint", space: "HostSpace") -> None:
        """``space`` is empty. Raises HostError."""
        if self._core.bypass:
            space.open_all()
        self._spaces[endpoint.number] = space
        self.last = min(self.last, space.last)

    def forget(self, number: int) -> None:
        self._spaces.pop(number, None)

    def follow(self, endpoint: "Endpoint") -> int:
        """``endpoint`` is in another domain, or in none: its space gets what holds there, or stays empty."""
        space, domain = self._spaces.get(endpoint.number), endpoint.domain
        if space is None:
            return 0
        space.unmap(0, space.last)
        try:
            if self._core.bypass if domain is None else domain.bypass:
                space.open_all()
            elif domain is not None:
                for mapping in domain.mappings:
                    space.map(*mapping)
        except (OSError, HostError) as error:
            space.unmap(0, space.last)
            log.limited(log.ERROR, f"{endpoint.name}: it reaches no memory: {error}")
            return -(getattr(error, "errno", None) or errno.EIO)
        return 0

    def map(self, domain: "Domain", first: int, last: int, gpa: int, access: int) -> int:
        """In all of ``domain``, or in none."""
        try:
            for space in self._of(domain):
                space.map(first, last, gpa, access)
        except OSError as error:
            self.unmap(domain, first, last)
            return -(error.errno or errno.EIO)
        return 0

    def unmap(self, domain: "Domain", first: int, last: int) -> None:
        for space in self._of(domain):
            space.unmap(first, last)

    def _of(self, domain: "Domain") -> "Iterator[HostSpace]":
        for endpoint in domain.endpoints if self._spaces else ():
            if (space := self._spaces.get(endpoint.number)) is not None:
                yield space
