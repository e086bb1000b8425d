"""User and group ids of the guest as those of the host, and back."""

import errno

NOBODY = 65534
Range = tuple[int, int, int]  # first of the guest's, first of the host's, how many


class Ids:
    """With no ranges they are the same on both sides."""

    def __init__(self, ranges: "tuple[Range, ...]" = ()) -> None:
        self.ranges = ranges

    def to_host(self, guest: int) -> int:
        """Raises OSError for one that the host has none for."""
        if not self.ranges:
            return guest
        for first, host, count in self.ranges:
            if first <= guest < first + count:
                return host + guest - first
        raise OSError(errno.EPERM, "an id outside of the map")

    def to_guest(self, host: int) -> int:
        """NOBODY for one that the guest has none for."""
        if not self.ranges:
            return host
        for guest, first, count in self.ranges:
            if first <= host < first + count:
                return guest + host - first
        return NOBODY
