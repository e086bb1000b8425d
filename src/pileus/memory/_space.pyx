"""Guest memory: mappings of the host, and the guest-physical address space made of them.

Every access by a guest-physical address is checked here, against the regions, before a byte moves.
"""

import os

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EINTR, EINVAL, errno
from libc.limits cimport LONG_MAX
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from posix.unistd cimport close

from pileus.errors import HostError
from pileus.memory._sigbus cimport guard, unguard


cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t size, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t size)
    int madvise(void *address, size_t size, int advice)
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
    int MADV_DONTNEED, MADV_HUGEPAGE, MADV_MERGEABLE, MADV_POPULATE_WRITE
    void *MAP_FAILED


cdef extern from "<fcntl.h>" nogil:
    int fallocate(int fd, int mode, long offset, long length)
    int FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE


cdef extern from "<sys/uio.h>" nogil:
    ssize_t pread(int fd, void *buffer, size_t length, long offset)


cdef extern from "<sys/vfs.h>" nogil:
    struct statfs:
        long f_type
        long f_bsize
    int fstatfs(int fd, statfs *result)


cdef extern from "<linux/magic.h>":
    long HUGETLBFS_MAGIC


cdef enum:
    PAGE_SHIFT = 12
    CHUNK = 1 << 30  # bytes per read: one call takes no more than 2 GiB less a page


def page_size_of(int fd):
    """The page size in bytes of a mapping of ``fd``: hugetlbfs's own, else 4096."""
    cdef statfs info
    if fstatfs(fd, &info) < 0:
        raise OSError(errno, os.strerror(errno))
    return info.f_bsize if info.f_type == HUGETLBFS_MAGIC else 1 << PAGE_SHIFT


cdef class Region:
    """``size`` bytes of ``fd`` from ``offset``, mapped shared; of memory that is this process's alone where
    ``fd`` is -1. Readable as a writable buffer. ``private``: writes stay in this process and never reach ``fd``.

    Owns ``fd`` and closes it, unless making the region raises HostError. ``reserve`` makes the host set the
    pages aside at once, which is how huge pages fail here rather than by SIGBUS in the guest. ``guarded``:
    ``fd`` is a peer's, who may truncate it (``_sigbus``). ``offset`` and ``size`` may be any.
    """

    def __cinit__(
        self,
        int fd,
        uint64_t size,
        uint64_t offset=0,
        bint reserve=False,
        uint64_t page_size=4096,
        bint private=False,
        bint guarded=False,
    ):
        cdef int flags = MAP_PRIVATE if private or fd < 0 else MAP_SHARED
        flags |= (0 if fd >= 0 else MAP_ANONYMOUS) | (0 if reserve else MAP_NORESERVE)
        self.private = private or fd < 0
        cdef uint64_t lead = offset % page_size
        cdef uint64_t mapped = (lead + size + page_size - 1) // page_size * page_size
        cdef void *base
        cdef int error
        self.fd, self.size, self.offset, self.page_size, self.base = fd, size, offset, page_size, NULL
        if size == 0 or mapped < size or offset - lead > <uint64_t>LONG_MAX:
            raise HostError("map", f"{size >> 20} MiB of guest memory", OSError(EINVAL, "mmap"))
        base = mmap(NULL, mapped, PROT_READ | PROT_WRITE, flags, fd, offset - lead)
        error = errno
        if base == MAP_FAILED:
            raise HostError("map", f"{size >> 20} MiB of guest memory", OSError(error, "mmap"))
        self.guarded = guard(base, mapped, page_size) if guarded else -1
        if guarded and self.guarded < 0:
            munmap(base, mapped)
            raise HostError("map", f"{size >> 20} MiB of guest memory", "there are too many mappings")
        self.lead, self.mapped = lead, mapped
        self.base = <uint8_t *>base + lead

    def __dealloc__(self):
        if self.base == NULL:
            return  # closed, or never mapped and so not the owner of ``fd``
        self._unmap(self.base)
        if self.fd >= 0:
            close(self.fd)

    cdef void _unmap(self, uint8_t *base) noexcept nogil:
        if self.guarded >= 0:
            unguard(self.guarded)
        munmap(base - self.lead, self.mapped)

    @property
    def hva(self):
        """Where the region is mapped in this process."""
        return <uint64_t>self.base

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if self.base == NULL:
            raise ValueError("this region is closed")
        PyBuffer_FillInfo(buffer, self, self.base, self.size, False, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.exports -= 1

    cdef _check_unused(self):
        if self.exports:
            raise BufferError(f"{self.exports} views of this region are alive")

    cdef _advise(self, int advice, str doing):
        cdef int error
        with nogil:
            error = errno if madvise(self.base, self.size, advice) < 0 else 0
        if error:
            raise HostError(doing, f"{self.size >> 20} MiB of guest memory", OSError(error, "madvise"))

    def advise_huge(self):
        """Ask for transparent huge pages."""
        self._advise(MADV_HUGEPAGE, "use transparent huge pages for")

    def advise_mergeable(self):
        """Let the kernel's same-page merging look at it."""
        self._advise(MADV_MERGEABLE, "merge")

    cdef int give_back(self, uint64_t offset, uint64_t length) noexcept nogil:
        """A file's pages go with a hole in it; dropping the mapping alone would keep them."""
        cdef int failed
        if self.fd >= 0:
            failed = fallocate(
                self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, self.offset + offset, length
            )
        else:
            failed = madvise(self.base + offset, length, MADV_DONTNEED)
        return -errno if failed else 0

    def prefault(self):
        """Make every page present now, so that the guest never waits for one."""
        self._advise(MADV_POPULATE_WRITE, "prefault")

    def close(self):
        """Unmap and close. Raises BufferError while a memoryview of it is alive."""
        cdef uint8_t *base = self.base
        self._check_unused()
        if base != NULL:
            self.base = NULL
            with nogil:  # a large region takes seconds
                self._unmap(base)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


cdef class GuestMemory:
    """The guest-physical RAM made of ``regions``, (gpa, Region) in ascending order; owns and closes them.

    Other memory that devices can reach, persistent memory for one, is ``attach``ed later.
    """

    def __cinit__(self, regions):
        cdef Region region
        if len(regions) > MAX_SPANS:
            raise ValueError(f"a guest has at most {MAX_SPANS} regions of RAM, not {len(regions)}")
        self.regions, self.attached = list(regions), []
        for gpa, region in self.regions:
            self._add_span(gpa, region)
            self.size += region.size

    cdef _add_span(self, uint64_t gpa, Region region):
        cdef Span *span = &self.spans[self.count]
        span.gpa, span.size, span.hva, span.dirty = gpa, region.size, region.base, NULL
        self.count += 1

    def __dealloc__(self):
        self.stop_tracking()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Close the regions. Raises BufferError, with nothing closed, while a view of one is alive."""
        cdef Region region
        for _, region in self.regions + self.attached:
            region._check_unused()
        self.stop_tracking()
        self.count = 0
        for regions in (self.attached, self.regions):
            while regions:
                regions[-1][1].close()
                regions.pop()

    def attach(self, uint64_t gpa, Region region not None):
        """Let devices reach ``region`` at ``gpa``, though it is no RAM; before any of them is active.

        Owns it from here on. Raises ValueError where there are too many.
        """
        if self.count == MAX_SPANS:
            raise ValueError(f"a guest has at most {MAX_SPANS} regions of memory")
        self.attached.append((gpa, region))
        self._add_span(gpa, region)

    @property
    def shareable(self):
        """What another process is to be given, if any: all but what others cannot see anyway."""
        return self.regions + [each for each in self.attached if not each[1].private]

    @property
    def ranges(self):
        """(gpa, size) of each region of RAM, ascending."""
        return [(gpa, region.size) for gpa, region in self.regions]

    cdef uint8_t *at(self, uint64_t gpa, uint64_t length) noexcept nogil:
        cdef size_t index
        cdef Span *span
        cdef uint64_t offset
        for index in range(self.count):
            span = &self.spans[index]
            offset = gpa - span.gpa  # wraps to something large below the span
            if offset < span.size:
                return span.hva + offset if 0 < length <= span.size - offset else NULL
        return NULL

    cdef uint8_t *reach(self, uint64_t gpa, uint64_t *available) noexcept nogil:
        cdef size_t index
        cdef Span *span
        for index in range(self.count):
            span = &self.spans[index]
            if gpa - span.gpa < span.size:
                available[0] = span.size - (gpa - span.gpa)
                return span.hva + (gpa - span.gpa)
        return NULL

    cdef void mark(self, uint64_t gpa, uint64_t length) noexcept nogil:
        cdef size_t index
        cdef Span *span
        cdef uint64_t page, last
        for index in range(self.count):
            span = &self.spans[index]
            if gpa - span.gpa < span.size and span.dirty != NULL and length > 0:
                page = (gpa - span.gpa) >> PAGE_SHIFT
                last = (gpa - span.gpa + length - 1) >> PAGE_SHIFT
                while page <= last:
                    _set_bit(&span.dirty[page >> 6], <uint64_t>1 << (page & 63))
                    page += 1
        if self.log != NULL and length > 0:
            page, last = gpa >> PAGE_SHIFT, (gpa + length - 1) >> PAGE_SHIFT
            while page <= last and page >> 3 < self.log_region.size:
                _set_log_bit(&self.log[page >> 3], <uint8_t>1 << (page & 7))
                page += 1

    def log_to(self, Region region):
        """Note each page that is written also in ``region``, a bit by gpa; None for nowhere.

        It is kept open until then. Only while nobody writes.
        """
        self.log_region = region
        self.log = NULL if region is None else region.base
        self.tracked = self.log != NULL or self._has_bitmaps()

    def _has_bitmaps(self):
        cdef size_t index
        return any([self.spans[index].dirty != NULL for index in range(self.count)])

    def start_tracking(self):
        """From now on note the pages that the VMM itself writes; KVM notes what the guest writes."""
        cdef size_t index
        for index in range(self.count):
            if self.spans[index].dirty == NULL:
                self.spans[index].dirty = <uint64_t *>calloc(_words(self.spans[index].size), 8)
                if self.spans[index].dirty == NULL:
                    raise MemoryError
        self.tracked = True

    def stop_tracking(self):
        cdef size_t index
        self.tracked = self.log != NULL
        for index in range(self.count):
            free(self.spans[index].dirty)
            self.spans[index].dirty = NULL

    def take_dirty(self, size_t index):
        """The bitmap of region ``index`` since the last call, a bit per 4 KiB page in 64-bit words, and clear it."""
        cdef size_t word, words
        if index >= self.count or self.spans[index].dirty == NULL:
            raise ValueError(f"region {index} is not tracked")
        words = _words(self.spans[index].size)
        cdef bytearray taken = bytearray(words * 8)
        cdef uint64_t *copy = <uint64_t *><char *>taken
        for word in range(words):
            copy[word] = _exchange(&self.spans[index].dirty[word], 0)
        return taken

    def view(self, uint64_t gpa, uint64_t size):
        """A writable view; the caller marks what it writes. Raises ValueError outside one region."""
        for base, region in self.regions + self.attached:
            if base <= gpa < base + region.size and size <= base + region.size - gpa:
                return memoryview(region)[gpa - base : gpa - base + size]
        raise ValueError(f"{size:#x} bytes at {gpa:#x} are not guest memory")

    def mark_dirty(self, uint64_t gpa, uint64_t length):
        """For the writer of a ``view``. Raises ValueError as ``view`` does; no bytes are no access."""
        if length == 0:
            return
        if self.at(gpa, length) == NULL:
            raise ValueError(f"{length:#x} bytes at {gpa:#x} are not guest memory")
        self.mark(gpa, length)

    def read(self, uint64_t gpa, uint64_t size):
        """A copy of RAM as bytes. Raises ValueError as ``view`` does."""
        cdef uint8_t *source = self.at(gpa, size)
        if source == NULL:
            if size == 0:
                return b""
            raise ValueError(f"{size:#x} bytes at {gpa:#x} are not guest memory")
        return (<char *>source)[:size]

    def write(self, uint64_t gpa, data):
        """Copy the bytes-like ``data`` to RAM. Raises ValueError as ``view`` does."""
        cdef Py_buffer buffer  # a typed memoryview would make every start import collections.abc
        cdef uint8_t *target
        PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE)
        try:
            if buffer.len == 0:
                return
            target = self.at(gpa, buffer.len)
            if target == NULL:
                raise ValueError(f"{buffer.len:#x} bytes at {gpa:#x} are not guest memory")
            memcpy(target, buffer.buf, buffer.len)
            self.mark(gpa, buffer.len)
        finally:
            PyBuffer_Release(&buffer)

    def discard(self, uint64_t gpa, uint64_t length):
        """Give the whole pages of the host in that range back to it: they read as zeroes from now on.

        Returns how many bytes that were, 0 where the range holds no whole page (huge ones are large) or is no
        RAM. Raises ValueError as ``view`` does, HostError where the host refuses.
        """
        cdef size_t index
        cdef Region region
        cdef uint64_t start, end
        cdef int error
        if length == 0:
            return 0
        if self.at(gpa, length) == NULL:
            raise ValueError(f"{length:#x} bytes at {gpa:#x} are not guest memory")
        index = 0
        while gpa - self.spans[index].gpa >= self.spans[index].size:
            index += 1
        if index >= len(self.regions):
            return 0  # what is attached is not ours to give away
        region = self.regions[index][1]
        start = (gpa - self.spans[index].gpa + region.page_size - 1) // region.page_size * region.page_size
        end = (gpa - self.spans[index].gpa + length) // region.page_size * region.page_size
        if end <= start:
            return 0
        with nogil:
            error = -region.give_back(start, end - start)
        if error:
            raise HostError("give back", f"{end - start} bytes of guest memory", OSError(error, "discard"))
        self.mark(self.spans[index].gpa + start, end - start)
        return end - start

    def load_file(self, uint64_t gpa, int fd, uint64_t offset, uint64_t length):
        """Read ``length`` bytes at ``offset`` of ``fd`` straight into RAM.

        Raises ValueError as ``view`` does, EOFError where the file ends before, OSError where reading fails.
        """
        cdef uint8_t *target = self.at(gpa, length)
        cdef uint64_t done = 0
        cdef ssize_t got
        cdef int error
        if length == 0:
            return
        if target == NULL:
            raise ValueError(f"{length:#x} bytes at {gpa:#x} are not guest memory")
        while done < length:
            with nogil:
                got = pread(fd, target + done, min(length - done, <uint64_t>CHUNK), offset + done)
                error = errno
            if got < 0 and error != EINTR:
                raise OSError(error, os.strerror(error))
            if got == 0:
                raise EOFError(f"the file ends {length - done} bytes early")
            if got > 0:
                self.mark(gpa + done, got)  # at once: what came before an error is in RAM all the same
                done += got


cdef class Translation:
    """An address space between a device and guest memory. This one is empty; see ``_iommu``."""

    cdef void enter(self) noexcept nogil:
        pass

    cdef void leave(self) noexcept nogil:
        pass

    cdef int find(self, uint64_t iova, Window *window) noexcept nogil:
        return NO_DOMAIN

    cdef void report(self, int reason, uint32_t access, uint64_t iova) noexcept nogil:
        pass


cdef extern from *:
    """
    #define pileus_set_bit(word, bit) ((void)__atomic_fetch_or((word), (bit), __ATOMIC_RELAXED))
    #define pileus_exchange(word, value) __atomic_exchange_n((word), (value), __ATOMIC_ACQ_REL)
    """
    void _set_bit "pileus_set_bit"(uint64_t *word, uint64_t bit) nogil
    void _set_log_bit "pileus_set_bit"(uint8_t *word, uint8_t bit) nogil
    uint64_t _exchange "pileus_exchange"(uint64_t *word, uint64_t value) nogil


cdef size_t _words(uint64_t size) noexcept nogil:
    """64-bit words of a bitmap with a bit per page of ``size`` bytes."""
    return (((size - 1) >> PAGE_SHIFT) + 64) // 64
