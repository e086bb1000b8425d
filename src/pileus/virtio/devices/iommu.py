"""virtio-iommu: the guest says which addresses of its memory a device may reach, and under which names.

The address spaces are ``pileus.memory._iommu``, which queues ask; here is the driver's side of them.

Source: virtio 1.2, 5.13 (IOMMU Device)
"""

import errno
import struct

from pileus import log
from pileus.errors import GuestError
from pileus.memory._iommu import Iommu
from pileus.virtio import ids
from pileus.virtio.device import VirtioDevice
from pileus.virtio.host_spaces import HostSpaces

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pileus.memory._iommu import Domain
    from pileus.virtio.device import State
    from pileus.virtio.host_spaces import HostSpace
    from pileus.virtio.queue import Chain

    Handler = Callable[["IommuDevice", tuple[int, ...]], int]

REQUESTQ, EVENTQ = 0, 1
QUEUE_SIZE = 256

F_INPUT_RANGE = 1 << 0
F_DOMAIN_RANGE = 1 << 1
F_MAP_UNMAP = 1 << 2
F_PROBE = 1 << 4
F_BYPASS_CONFIG = 1 << 6

# page_size_mask, input_range, domain_range, probe_size, bypass
CONFIG = struct.Struct("<QQQIIIB3x")  # 5.13.4
BYPASS = 36  # offset of that field, the only one a driver may write

PAGE = 4096
PAGE_SIZES = PAGE | 2 << 20 | 1 << 30  # what drivers cut mappings to; others do as well
INPUT_LAST = (1 << 48) - 1
DOMAIN_LAST = (1 << 16) - 1
PHYS_LAST = (1 << 52) - 1  # no x86 has more

T_ATTACH, T_DETACH, T_MAP, T_UNMAP, T_PROBE = range(1, 6)
OK, _IOERR, UNSUPP, DEVERR, INVAL, RANGE, NOENT, _FAULT, NOMEM = range(9)  # how a request ends
STATUS = {0: OK, -errno.EEXIST: INVAL, -errno.ENOMEM: NOMEM, -errno.ENOSPC: NOMEM}
TAIL = struct.Struct("<B3x")
MAX_REQUEST = 128  # bytes that the device reads; all are shorter
PROBE_SIZE = 64

ATTACH_BYPASS = 1 << 0
MAP_READ, MAP_WRITE = 1 << 0, 1 << 1

RESERVED_MEMORY = struct.Struct("<HHB3xQQ")  # 5.13.6.8: type, length, subtype, start, end
T_RESV_MEM, T_RESV_MEM_MSI = 1, 1
MSI_FIRST, MSI_LAST = 0xFEE00000, 0xFEEFFFFF  # writes there are interrupts (Intel SDM, vol. 3, 11.11.1)

FAULT = struct.Struct("<B3xIIIQ")  # reason, flags, endpoint, reserved, address
FAULT_ADDRESS = 1 << 8


class IommuDevice(VirtioDevice):
    """The driver's side of ``iommu``. ``bypass`` holds until the driver says otherwise.

    ``add`` puts a device of virtio behind it, ``add_host_device`` one that passes through.
    """

    id = ids.IOMMU
    features = F_INPUT_RANGE | F_DOMAIN_RANGE | F_MAP_UNMAP | F_PROBE | F_BYPASS_CONFIG
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE)

    def __init__(self, name: str, *, bypass: bool = True) -> None:
        super().__init__(name)
        self.core = Iommu(bypass)
        self.core.fault_fd = self.queues[EVENTQ].kick_fd  # the control loop reports what is noted
        self._requests = 0
        self._spaces = HostSpaces(self.core)
        self._set_bypass(bypass)

    def add(self, device: VirtioDevice, number: int) -> None:
        """Translate the addresses of ``device``; ``number`` is what its driver knows it by: a BDF."""
        device.iommu = self.core.add_endpoint(number, device.name)

    def add_host_device(self, number: int, name: str, space: "HostSpace") -> None:
        """Let ``space``, which is empty, follow what endpoint ``number`` is told. Raises HostError."""
        with self.lock:
            self._spaces.add(self.core.add_endpoint(number, name), space)
            self._set_bypass(self.bypass)

    def forget_host_device(self, number: int) -> None:
        """Its space is touched no more."""
        with self.lock:
            self._spaces.forget(number)

    def reset(self) -> None:
        """No endpoint is in a domain any more (5.13.5); ``bypass`` stays (5.13.4.2)."""
        attached = [endpoint for endpoint in self.core.endpoints.values() if endpoint.domain is not None]
        self.core.reset()
        for endpoint in attached:
            self._spaces.follow(endpoint)

    def close(self) -> None:
        self.core.fault_fd = -1
        super().close()

    def counters(self) -> "dict[str, int]":
        """Requests so far, what is mapped now, and faults that the driver was not told of."""
        mappings = sum(domain.mappings.count for domain in self.core.domains.values())
        return {"requests": self._requests, "mappings": mappings, "faults_dropped": self.core.dropped}

    # -- configuration ----------------------------------------------------------------------------

    @property
    def bypass(self) -> bool:
        """Whether endpoints in no domain reach all memory, or else nothing."""
        return self.core.bypass

    def write_config(self, offset: int, data: bytes) -> None:
        if (
            offset <= BYPASS < offset + len(data)
            and self._has(F_BYPASS_CONFIG)
            and data[BYPASS - offset] <= 1
        ):
            self._set_bypass(bool(data[BYPASS - offset]))

    def _set_bypass(self, bypass: bool) -> None:
        changed = self.core.bypass != bypass
        self.core.bypass = bypass
        self.config = CONFIG.pack(PAGE_SIZES, 0, self._input_last, 0, DOMAIN_LAST, PROBE_SIZE, bypass)
        for endpoint in self.core.endpoints.values() if changed else ():
            if endpoint.domain is None:
                self._spaces.follow(endpoint)

    @property
    def _input_last(self) -> int:
        """The last address that a device behind this can use."""
        return min(INPUT_LAST, self._spaces.last)

    def _has(self, feature: int) -> bool:
        return self.driver_features & feature == feature

    # -- queues -----------------------------------------------------------------------------------

    def handle_queue(self, index: int) -> None:
        if index == REQUESTQ:
            self._serve_requests()
        else:
            self._report_faults()

    def _serve_requests(self) -> None:
        queue = self.queues[REQUESTQ]
        for chain in queue:
            queue.push_used(chain, self._answer(chain))
            self._requests += 1

    def _answer(self, chain: "Chain") -> int:
        """Return the bytes written: none where there is no such request, or no place for its status."""
        data = chain.read(MAX_REQUEST)
        kind = data[0] if data else 0
        layout, needed, handler = REQUESTS.get(kind, NO_REQUEST)
        if len(data) < layout.size or chain.writable_len < TAIL.size or not self._has(needed):
            return 0
        if kind == T_PROBE:
            return self._probe(chain, *layout.unpack_from(data))
        return chain.write(TAIL.pack(handler(self, layout.unpack_from(data))))

    def _report_faults(self) -> None:
        """As many as the driver has buffers for; the others wait, or are counted as dropped."""
        queue, core = self.queues[EVENTQ], self.core
        while core.faults_waiting:
            chain = queue.pop()
            if chain is None:
                if queue.listen():
                    continue
                break
            if chain.readable_len or chain.writable_len < FAULT.size:
                raise GuestError(
                    f"a buffer for faults has {FAULT.size} bytes for the device to write (5.13.6.9)"
                )
            if (fault := core.take_fault()) is None:
                break
            reason, access, endpoint, iova = fault
            name = core.endpoints[endpoint].name
            log.limited(log.WARNING, f"{name}: the virtual IOMMU refuses an access to {iova:#x}")
            queue.push_used(chain, chain.write(FAULT.pack(reason, access | FAULT_ADDRESS, endpoint, 0, iova)))

    # -- requests ---------------------------------------------------------------------------------

    def _attach(self, fields: tuple[int, ...]) -> int:
        number, endpoint_number, flags, reserved = fields
        known = ATTACH_BYPASS if self._has(F_BYPASS_CONFIG) else 0
        endpoint = self.core.endpoints.get(endpoint_number)
        domain = self.core.domains.get(number)
        bypass = bool(flags & ATTACH_BYPASS)
        if reserved or flags & ~known:
            return INVAL
        if endpoint is None:
            return NOENT
        if number > DOMAIN_LAST:
            return RANGE
        if domain is not None and domain.bypass != bypass:
            return INVAL
        if endpoint.domain is not None and endpoint.domain.number == number:
            return OK
        self.core.attach(endpoint, number, bypass)
        result = self._spaces.follow(endpoint)
        if result:
            self.core.detach(endpoint)
        return STATUS.get(result, DEVERR)

    def _detach(self, fields: tuple[int, ...]) -> int:
        number, endpoint_number = fields
        endpoint = self.core.endpoints.get(endpoint_number)
        if endpoint is None:
            return NOENT
        if endpoint.domain is None or endpoint.domain.number != number:
            return INVAL
        self.core.detach(endpoint)
        self._spaces.follow(endpoint)
        return OK

    def _map(self, fields: tuple[int, ...]) -> int:
        number, first, last, gpa, flags = fields
        if flags & ~(MAP_READ | MAP_WRITE):
            return INVAL
        domain = self._domain(number)
        if isinstance(domain, int):
            return domain
        if first > last or last > self._input_last or gpa + (last - first) > PHYS_LAST:
            return RANGE
        if first % PAGE or gpa % PAGE or (last + 1) % PAGE:
            return RANGE
        if first <= MSI_LAST and last >= MSI_FIRST:
            return INVAL
        result = self.core.map(domain, first, last, gpa, flags)
        if not result and (result := self._spaces.map(domain, first, last, gpa, flags)):
            self.core.unmap(domain, first, last)
        return STATUS.get(result, DEVERR)

    def _unmap(self, fields: tuple[int, ...]) -> int:
        number, first, last = fields
        domain = self._domain(number)
        if isinstance(domain, int):
            return domain
        if first > last:
            return RANGE
        if self.core.unmap(domain, first, last) < 0:
            return RANGE
        self._spaces.unmap(domain, first, last)
        return OK

    def _domain(self, number: int) -> "Domain | int":
        """The domain to map in, or why nothing can be mapped there."""
        if number > DOMAIN_LAST:
            return RANGE
        domain = self.core.domains.get(number)
        if domain is None:
            return NOENT
        return INVAL if domain.bypass else domain

    def _probe(self, chain: "Chain", endpoint: int) -> int:
        """What is special about an endpoint: only that the addresses of interrupts cannot be mapped."""
        properties, status = b"", OK
        if endpoint not in self.core.endpoints:
            status = NOENT
        elif chain.writable_len < PROBE_SIZE + TAIL.size:
            status = INVAL
        else:
            length = RESERVED_MEMORY.size - 4  # less type and length
            properties = RESERVED_MEMORY.pack(T_RESV_MEM, length, T_RESV_MEM_MSI, MSI_FIRST, MSI_LAST)
        room = min(chain.writable_len - TAIL.size, PROBE_SIZE)
        return chain.write(properties.ljust(room, b"\0") + TAIL.pack(status))

    # -- saving -----------------------------------------------------------------------------------

    def state(self) -> "State":
        """Endpoints are known by their numbers. Faults that nobody was told of are forgotten."""
        return {
            "bypass": self.core.bypass,
            "domains": [
                {
                    "number": domain.number,
                    "bypass": domain.bypass,
                    "endpoints": [endpoint.number for endpoint in domain.endpoints],
                    "mappings": [list(each) for each in domain.mappings],
                }
                for domain in self.core.domains.values()
            ],
        }

    def restore(self, state: "State") -> None:
        """Before any device behind it is. Raises ValueError where the driver could not have got there."""
        self.core.reset()
        self._set_bypass(bool(state["bypass"]))
        try:
            for saved in state["domains"]:
                self._restore_domain(saved)
        except OverflowError as error:
            raise ValueError(f"{self.name}: no IOMMU is in the state {state}") from error

    def _restore_domain(self, saved: "State") -> None:
        number = saved["number"]
        for endpoint_number in saved["endpoints"]:
            endpoint = self.core.endpoints.get(endpoint_number)
            if endpoint is None or endpoint.domain is not None or not 0 <= number <= DOMAIN_LAST:
                raise ValueError(f"{self.name}: no endpoint {endpoint_number:#x} can be in domain {number}")
            self.core.attach(endpoint, number, bool(saved["bypass"]))
            self._spaces.follow(endpoint)
        for first, last, gpa, flags in saved["mappings"]:
            if self._map((number, first, last, gpa, flags)) != OK:
                raise ValueError(f"{self.name}: nothing can be mapped to {first:#x}-{last:#x}")


# kind -> the bytes that the device reads, behind whatever feature, and who serves it
REQUESTS: "dict[int, tuple[struct.Struct, int, Handler]]" = {
    T_ATTACH: (struct.Struct("<4xIIII"), 0, IommuDevice._attach),
    T_DETACH: (struct.Struct("<4xII8x"), 0, IommuDevice._detach),
    T_MAP: (struct.Struct("<4xIQQQI"), F_MAP_UNMAP, IommuDevice._map),
    T_UNMAP: (struct.Struct("<4xIQQ4x"), F_MAP_UNMAP, IommuDevice._unmap),
    T_PROBE: (struct.Struct("<4xI64x"), F_PROBE, lambda device, fields: UNSUPP),
}
NO_REQUEST: "tuple[struct.Struct, int, Handler]" = (struct.Struct(""), 1 << 63, lambda device, fields: UNSUPP)
