"""The bus: which device answers an address. Looked up on every exit, without the GIL."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec


cdef extern from *:
    """
    #define pileus_add_u64(place, value) ((void)__atomic_fetch_add((place), (value), __ATOMIC_RELAXED))
    #define pileus_load_acquire_u64(place) __atomic_load_n((place), __ATOMIC_ACQUIRE)
    #define pileus_store_release_u64(place, value) __atomic_store_n((place), (value), __ATOMIC_RELEASE)
    #define pileus_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    """
    void add_u64 "pileus_add_u64"(uint64_t *place, uint64_t value) nogil
    uint64_t load_acquire_u64 "pileus_load_acquire_u64"(uint64_t *place) nogil
    void store_release_u64 "pileus_store_release_u64"(uint64_t *place, uint64_t value) nogil
    void fence "pileus_fence"() nogil


ctypedef int (*RawRead)(void *, uint64_t, uint8_t *, uint32_t) noexcept nogil
ctypedef int (*RawWrite)(void *, uint64_t, const uint8_t *, uint32_t) noexcept nogil


cdef class Device:
    """Something that answers reads and writes at offsets within the range it is inserted at."""

    cdef int bus_read(self, uint64_t offset, uint8_t *data, uint32_t size) noexcept nogil:
        return 0

    cdef int bus_write(self, uint64_t offset, const uint8_t *data, uint32_t size) noexcept nogil:
        return 0


cdef class PythonDevice(Device):
    """A device whose ``read`` and ``write`` are Python: the vCPU takes the GIL to call them."""

    def read(self, offset, size):
        return (1 << (8 * size)) - 1

    def write(self, offset, size, value):
        pass

    cdef int bus_read(self, uint64_t offset, uint8_t *data, uint32_t size) noexcept nogil:
        cdef uint64_t value
        with gil:
            try:
                value = self.read(offset, size) & <uint64_t>0xFFFFFFFFFFFFFFFF
            except BaseException as error:
                self.error = error
                return -1
        memcpy(data, &value, size)
        return 0

    cdef int bus_write(self, uint64_t offset, const uint8_t *data, uint32_t size) noexcept nogil:
        cdef uint64_t value = 0
        memcpy(&value, data, size)
        with gil:
            try:
                self.write(offset, size, value)
            except BaseException as error:
                self.error = error
                return -1
        return 0


# A Range holds its device as a bare pointer, because a reference cannot be taken without the GIL.
cdef int _read_device(Device device, uint64_t offset, uint8_t *data, uint32_t size) noexcept nogil:
    cdef uint64_t began = _now_ns()
    cdef int result = device.bus_read(offset, data, size)
    _note(device, began)
    return result


cdef int _write_device(Device device, uint64_t offset, const uint8_t *data, uint32_t size) noexcept nogil:
    cdef uint64_t began = _now_ns()
    cdef int result = device.bus_write(offset, data, size)
    _note(device, began)
    return result


cdef void _note(Device device, uint64_t began) noexcept nogil:
    add_u64(&device.accesses, 1)
    add_u64(&device.busy_ns, _now_ns() - began)


cdef uint64_t _now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef RawRead read_device = <RawRead>_read_device
cdef RawWrite write_device = <RawWrite>_write_device


cdef Range *_find(Table *table, uint64_t address, uint32_t size) noexcept nogil:
    """The range that holds all of [address, address + size), or NULL."""
    cdef size_t low = 0, high, middle
    cdef Range *found
    high = table.count
    while low < high:
        middle = (low + high) // 2
        found = &table.ranges[middle]
        if address < found.base:
            high = middle
        elif address > found.last:
            low = middle + 1
        elif size - 1 > found.last - address:
            return NULL
        else:
            return found
    return NULL


cdef class Bus:
    """Ports or MMIO: an ordered set of ranges, each with its device.

    ``insert`` and ``remove`` rewrite the table in place, and a vCPU that looked meanwhile looks again. A
    table that was outgrown and a device that was removed live as long as the bus, since a vCPU may still be
    inside them; a guest that moves a device to and fro takes no more memory for it.
    """

    def __cinit__(self, str name):
        self.name = name
        self.ranges = {}
        self.retired = []
        self.table = NULL
        self._publish()

    def __dealloc__(self):
        cdef Table *older
        while self.table != NULL:
            older = self.table.older
            free(self.table)
            self.table = older

    cdef _publish(self):
        cdef size_t count = len(self.ranges), index = 0
        cdef size_t capacity = 2 * count
        cdef Table *table = <Table *>malloc(sizeof(Table) + capacity * sizeof(Range))
        if table == NULL:
            raise MemoryError
        table.count = count
        table.capacity = capacity
        table.older = self.table
        for base, (size, device) in sorted(self.ranges.items(), key=lambda item: item[0]):
            table.ranges[index].base = base
            table.ranges[index].last = base + size - 1
            table.ranges[index].device = <void *>device
            index += 1
        if self.table == NULL or count > self.table.capacity:
            fence()  # what is in the table, before the table
            self.table = table
            return
        # Nothing from here on gives up the GIL, so that there is one writer.
        store_release_u64(&self.sequence, self.sequence + 1)
        fence()  # "being written", before what is written
        self.table.count = count
        memcpy(self.table.ranges, table.ranges, count * sizeof(Range))
        store_release_u64(&self.sequence, self.sequence + 1)
        free(table)

    cdef bint _look_up(self, uint64_t address, uint32_t size, Range *found) noexcept nogil:
        """Copy the range that holds the access to ``found``; false where there is none."""
        cdef uint64_t sequence
        cdef Range *range_
        while True:
            sequence = load_acquire_u64(&self.sequence)
            range_ = _find(self.table, address, size)
            if range_ != NULL:
                found[0] = range_[0]
            fence()  # what was read of the table, before whether it was whole
            if not sequence & 1 and load_acquire_u64(&self.sequence) == sequence:
                return range_ != NULL

    def insert(self, base, size, Device device not None):
        """Let ``device`` answer [base, base + size). Raises ValueError where another one already does."""
        if size <= 0 or base < 0 or base + size > 1 << 64:
            raise ValueError(f"{self.name}: no range at {base:#x} of {size:#x} bytes")
        for other, (other_size, _) in self.ranges.items():
            if base < other + other_size and other < base + size:
                raise ValueError(f"{self.name}: {base:#x} + {size:#x} overlaps {other:#x} + {other_size:#x}")
        self.ranges[base] = (size, device)
        self._publish()

    def remove(self, base):
        """Nothing answers at ``base`` any more. Raises KeyError if nothing did."""
        _, device = self.ranges.pop(base)
        if not any(device is known for known in self.retired):
            self.retired.append(device)
        self._publish()

    @property
    def usage(self):
        """(base, device, accesses, nanoseconds in the device) for each device that a guest ever used."""
        cdef Device device
        return [
            (base, device, device.accesses, device.busy_ns)
            for base, (_, device) in sorted(self.ranges.items(), key=lambda item: item[0])
            if device.accesses
        ]

    def take_error(self):
        """An exception that a Python device of this bus raised and that nobody took yet, or None."""
        for device in [device for _, device in self.ranges.values()] + self.retired:
            if isinstance(device, PythonDevice) and (<PythonDevice>device).error is not None:
                error = (<PythonDevice>device).error
                (<PythonDevice>device).error = None
                return error
        return None

    cdef int read(self, uint64_t address, uint8_t *data, uint32_t size) noexcept nogil:
        """Fill ``data``; with ones where nothing answers, as a floating bus reads."""
        cdef Range found
        memset(data, 0xFF, size)
        if not self._look_up(address, size, &found):
            return 0
        return read_device(found.device, address - found.base, data, size)

    cdef int write(self, uint64_t address, const uint8_t *data, uint32_t size) noexcept nogil:
        cdef Range found
        if not self._look_up(address, size, &found):
            return 0
        return write_device(found.device, address - found.base, data, size)

    def load(self, uint64_t address, uint32_t size):
        """What the guest would read: for tests and for devices that bridge to this bus."""
        cdef uint64_t value = 0
        if not 1 <= size <= 8:
            raise ValueError(f"{self.name}: an access is 1 to 8 bytes, not {size}")
        if self.read(address, <uint8_t *>&value, size) < 0:
            raise self.take_error()
        return value

    def store(self, uint64_t address, uint32_t size, uint64_t value):
        """What a guest's write would do."""
        if not 1 <= size <= 8:
            raise ValueError(f"{self.name}: an access is 1 to 8 bytes, not {size}")
        if self.write(address, <const uint8_t *>&value, size) < 0:
            raise self.take_error()
