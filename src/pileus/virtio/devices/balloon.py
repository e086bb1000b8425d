"""virtio-balloon: the guest gives memory back to the host, which takes and returns it page by page.

The queues are numbered without gaps: statistics and reporting have one if the driver accepted the feature.
That is what drivers and devices do, whatever 5.5.2 says.

Source: virtio 1.2, 5.5 (Traditional Memory Balloon Device)
"""

import os
import struct

from pileus import log
from pileus.errors import GuestError, HostError
from pileus.virtio import ids
from pileus.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pileus.config.model import BalloonConfig
    from pileus.virtio.device import State
    from pileus.virtio.queue import Chain

PAGE_SHIFT = 12  # of a page of the balloon, whatever the guest's and the host's pages are
PAGE = 1 << PAGE_SHIFT
INFLATEQ, DEFLATEQ = 0, 1
QUEUE_SIZE = 128

F_STATS_VQ = 1 << 1
F_DEFLATE_ON_OOM = 1 << 2
F_REPORTING = 1 << 5

CONFIG = struct.Struct("<II")  # num_pages: what we want; actual: what the driver gave
ACTUAL = 4  # its offset

MAX_PAGES = (1 << 32) - 1  # that can be asked for: 16 TiB
MAX_LIST = 16 << 10  # bytes of a list of page numbers; Linux sends 1 KiB
PAGES_PER_KICK = 4096
BYTES_PER_KICK = 1 << 30  # of reported pages

STATISTIC = struct.Struct("<HQ")  # tag, value
MAX_STATISTICS = 64
STATISTICS = (  # by tag; counts are of events since the guest's boot, sizes in bytes
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kill",
    "alloc_stall",
    "async_scan",
    "direct_scan",
    "async_reclaim",
    "direct_reclaim",
)


class Balloon(VirtioDevice):
    """Wants ``size`` bytes of the guest's memory; ``resize`` changes its mind. ``actual`` is what it has."""

    id = ids.BALLOON

    def __init__(
        self,
        name: str,
        size: int = 0,
        *,
        deflate_on_oom: bool = False,
        free_page_reporting: bool = False,
        statistics: bool = False,
    ) -> None:
        self.features = (
            (F_DEFLATE_ON_OOM if deflate_on_oom else 0)
            | (F_REPORTING if free_page_reporting else 0)
            | (F_STATS_VQ if statistics else 0)
        )
        self.queue_sizes = (QUEUE_SIZE,) * (2 + free_page_reporting + statistics)
        super().__init__(name)
        self.statistics: dict[str, int] = {}  # what the driver told last
        self.config = CONFIG.pack(min(size >> PAGE_SHIFT, MAX_PAGES), 0)
        self._stats_chain: Chain | None = None  # the driver's buffer; to give it back asks for news
        self._parts: dict[int, int] = {}  # huge page -> its pages in the balloon, a bit each

    @property
    def size(self) -> int:
        """Bytes that the guest is asked for."""
        return int(CONFIG.unpack(self.config)[0]) << PAGE_SHIFT

    @property
    def actual(self) -> int:
        """Bytes that the driver says it gave."""
        return int(CONFIG.unpack(self.config)[1]) << PAGE_SHIFT

    def resize(self, size: int) -> None:
        """Ask for ``size`` bytes instead; the driver gets there in its own time, or never."""
        with self.lock:
            pages = min(size >> PAGE_SHIFT, MAX_PAGES)
            self.reconfigure(CONFIG.pack(pages, self.actual >> PAGE_SHIFT))

    def request_statistics(self) -> bool:
        """Ask for news, which then replace ``statistics``; false while the driver is not listening."""
        with self.lock:
            if self.paused:
                return False
            chain, self._stats_chain = self._stats_chain, None
            if chain is None or self.failed:
                return False
            queue = self.queues[self._roles.index(Balloon._tell)]
            queue.push_used(chain, 0)
            queue.notify()
            return True

    # -- life -------------------------------------------------------------------------------------

    def activate(self) -> None:
        self._parts.clear()

    def reset(self) -> None:
        """The guest takes its memory back without a word."""
        self._stats_chain = None
        self.statistics = {}
        self._parts.clear()
        self.config = CONFIG.pack(self.size >> PAGE_SHIFT, 0)

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == ACTUAL and len(data) == 4:
            self.config = self.config[:ACTUAL] + data

    @property
    def _roles(self) -> list:  # type: ignore[type-arg]
        """What is done with the chains of each queue."""
        roles = [Balloon._inflate, Balloon._deflate]
        if self.driver_features & F_STATS_VQ:
            roles.append(Balloon._tell)
        if self.driver_features & F_REPORTING:
            roles.append(Balloon._report)
        return roles

    def handle_queue(self, index: int) -> None:
        roles = self._roles
        if index < len(roles):
            roles[index](self, index)

    # -- the four queues --------------------------------------------------------------------------

    def _inflate(self, index: int) -> None:
        budget = PAGES_PER_KICK
        for chain in self.queues[index]:
            pages = self._pages(chain)
            for first, count in runs(pages):
                self._take(first << PAGE_SHIFT, count << PAGE_SHIFT)
            self.queues[index].push_used(chain, 0)
            budget -= len(pages)
            if budget <= 0:
                self.serve_again(index)
                break

    def _deflate(self, index: int) -> None:
        """Pages come back by being touched; there is nothing to do but to forget parts of huge ones."""
        budget = PAGES_PER_KICK
        for chain in self.queues[index]:
            pages = self._pages(chain)
            for page in pages if self._parts else ():
                self._forget_part(page << PAGE_SHIFT)
            self.queues[index].push_used(chain, 0)
            budget -= len(pages)
            if budget <= 0:
                self.serve_again(index)
                break

    def _pages(self, chain: "Chain") -> tuple[int, ...]:
        """The page numbers of a request."""
        if chain.writable_len or chain.readable_len > MAX_LIST:
            raise GuestError(f"a list of pages is device-readable, and of at most {MAX_LIST} bytes")
        count = chain.readable_len // 4
        return struct.unpack(f"<{count}I", chain.read(4 * count))

    def _tell(self, index: int) -> None:
        """The driver tells statistics; its buffer stays here until more are asked for."""
        queue = self.queues[index]
        for chain in queue:
            if chain.writable_len:
                raise GuestError("statistics are device-readable (5.5.6.3)")
            if self._stats_chain is not None:
                queue.push_used(self._stats_chain, 0)
            self._stats_chain = chain
            data = chain.read(MAX_STATISTICS * STATISTIC.size)
            whole = len(data) // STATISTIC.size * STATISTIC.size
            self.statistics = {
                STATISTICS[tag]: value
                for tag, value in STATISTIC.iter_unpack(data[:whole])
                if tag < len(STATISTICS)
            }

    def _report(self, index: int) -> None:
        """Free pages of the guest: the host may have them until the guest touches them again (5.5.6.7)."""
        budget = BYTES_PER_KICK
        for chain in self.queues[index]:
            if chain.readable_len:
                raise GuestError("reported pages are device-writable")
            for gpa, length, _ in chain.ranges:
                self._discard(gpa, length)
            self.queues[index].push_used(chain, 0)
            budget -= chain.writable_len
            if budget <= 0:
                self.serve_again(index)
                break

    # -- memory -----------------------------------------------------------------------------------

    def _take(self, gpa: int, length: int) -> None:
        """Take neighbouring pages, perhaps of several regions. Raises GuestError where there is no page."""
        assert self.memory is not None
        while length:
            for base, region in self.memory.regions:
                if base <= gpa < base + region.size:
                    break
            else:
                raise GuestError(f"the page at {gpa:#x} is not guest memory")
            here = min(length, base + region.size - gpa)
            if region.page_size == PAGE:
                self._discard(gpa, here)
            else:
                self._take_parts(gpa, here, region.page_size)
            gpa += here
            length -= here

    def _take_parts(self, gpa: int, length: int, page_size: int) -> None:
        """Of a huge page nothing goes back before all its parts are here."""
        whole = (1 << page_size // PAGE) - 1
        for part in range(gpa, gpa + length, PAGE):
            page = part - part % page_size
            parts = self._parts.get(page, 0) | 1 << (part - page) // PAGE
            self._parts[page] = parts
            if parts == whole:
                self._discard(page, page_size)

    def _forget_part(self, gpa: int) -> None:
        assert self.memory is not None
        for base, region in self.memory.regions:
            if base <= gpa < base + region.size:
                page = gpa - gpa % region.page_size
                if page in self._parts:
                    self._parts[page] &= ~(1 << (gpa - page) // PAGE)

    def _discard(self, gpa: int, length: int) -> None:
        """A host that refuses saves no memory; the guest is none the worse."""
        assert self.memory is not None
        try:
            self.memory.discard(gpa, length)
        except HostError as error:
            log.limited(log.WARNING, f"{self.name}: {error}")

    # -- saving -----------------------------------------------------------------------------------

    def state(self) -> "State":
        """The driver's buffer for statistics goes back into the ring; a kick fetches it again."""
        if self._stats_chain is not None:
            index = self._roles.index(Balloon._tell)
            self.queues[index].unpop(self._stats_chain)
            self._stats_chain = None
            os.eventfd_write(self.queues[index].kick_fd, 1)
        return {"config": self.config, "statistics": dict(self.statistics)}

    def restore(self, state: "State") -> None:
        if len(state["config"]) != CONFIG.size:
            raise ValueError(f"{self.name}: a configuration of {len(state['config'])} bytes was saved")
        self.config = state["config"]
        self.statistics = dict(state["statistics"])


def runs(pages: "Iterable[int]") -> list[tuple[int, int]]:
    """(first, count) of each run of neighbours."""
    found: list[tuple[int, int]] = []
    for page in sorted(set(pages)):
        if found and found[-1][0] + found[-1][1] == page:
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((page, 1))
    return found


def make_balloon(config: "BalloonConfig") -> Balloon:
    """The balloon of a configuration."""
    return Balloon(
        "balloon0",
        config.size,
        deflate_on_oom=config.deflate_on_oom,
        free_page_reporting=config.free_page_reporting,
        statistics=config.statistics,
    )
