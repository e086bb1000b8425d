"""Address spaces of devices: which endpoint is in which domain, and what is mapped there.

Engine threads look addresses up while the driver of the IOMMU changes what is mapped. One lock for readers and
writers keeps them apart: a queue holds it for reading while it walks a chain or touches a ring, and a change takes
it for writing, before waiting readers. So when ``unmap`` or ``detach`` returns, nobody is in the middle of a look-up,
and all that was remembered of earlier ones is void: ``generation`` of each endpoint concerned has moved on.

Changes are made by Python, one at a time, and keep the GIL while they have the lock: readers never want the GIL.

Source: virtio 1.2, 5.13.6 (IOMMU device: Device operations)
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint32_t, uint64_t

from pileus._posix cimport (
    eventfd_signal,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from pileus.memory._mappings cimport Mapping, Mappings
from pileus.memory._space cimport NO_DOMAIN, NO_MAPPING, READ, WRITE, Translation, Window


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_rwlockattr_t:
        pass
    int pthread_rwlockattr_init(pthread_rwlockattr_t *)
    int pthread_rwlockattr_destroy(pthread_rwlockattr_t *)
    int pthread_rwlockattr_setkind_np(pthread_rwlockattr_t *, int kind)
    int PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP
    int pthread_rwlock_init(pthread_rwlock_t *, const pthread_rwlockattr_t *)
    int pthread_rwlock_destroy(pthread_rwlock_t *)
    int pthread_rwlock_rdlock(pthread_rwlock_t *)
    int pthread_rwlock_wrlock(pthread_rwlock_t *)
    int pthread_rwlock_unlock(pthread_rwlock_t *)


MAX_MAPPINGS = 1 << 19  # of all domains of one IOMMU: they take 16 MiB of the host's memory, and never more than 64
FAULT_READ, FAULT_WRITE = READ, WRITE


cdef class Domain:
    """An address space, for as long as an endpoint is attached to it. With ``bypass`` IOVAs are GPAs."""

    def __init__(self, uint32_t number, bint bypass):
        self.number, self.bypass = number, bypass
        self.mappings = Mappings()
        self.endpoints = []


cdef class Endpoint(Translation):
    """What one device sees of ``iommu``. Made by ``Iommu.add_endpoint``."""

    def __init__(self, Iommu iommu not None, uint32_t number, str name not None):
        self.iommu, self.number, self.name = iommu, number, name

    cdef void enter(self) noexcept nogil:
        pthread_rwlock_rdlock(&self.iommu.lock)

    cdef void leave(self) noexcept nogil:
        pthread_rwlock_unlock(&self.iommu.lock)

    cdef int find(self, uint64_t iova, Window *window) noexcept nogil:
        cdef Mapping *mapping
        if self.domain is None and not self.iommu._bypass:
            return NO_DOMAIN
        if self.domain is None or self.domain.bypass:
            window.first = window.gpa = 0
            window.last = <uint64_t>-1
            window.access = READ | WRITE
            return 0
        mapping = self.domain.mappings.at(iova)
        if mapping == NULL:
            return NO_MAPPING
        window.first, window.last, window.gpa = mapping.first, mapping.last, mapping.gpa
        window.access = mapping.access & (READ | WRITE)
        return 0

    cdef void report(self, int reason, uint32_t access, uint64_t iova) noexcept nogil:
        cdef Fault fault
        fault.reason, fault.access, fault.endpoint, fault.iova = reason, access, self.number, iova
        self.iommu.note(&fault)

    def translate(self, uint64_t iova, uint32_t access):
        """(gpa, bytes that follow it) for an access, or the reason why there is none. For slow paths and tests."""
        cdef Window window
        cdef int reason
        self.enter()
        reason = self.find(iova, &window)
        self.leave()
        if reason == 0 and window.access & access != access:
            reason = NO_MAPPING
        if reason:
            return reason
        return window.gpa + (iova - window.first), int(window.last) - iova + 1


cdef class Iommu:
    """Endpoints and domains. ``bypass``: endpoints in no domain use GPAs; else they reach nothing.

    ``limit`` bounds what a driver can make the host remember.
    """

    def __cinit__(self, *_, **__):
        cdef pthread_rwlockattr_t kind
        self.fault_fd = -1
        pthread_rwlockattr_init(&kind)
        # Readers never nest, and a stream of them must not keep the driver of the IOMMU waiting.
        pthread_rwlockattr_setkind_np(&kind, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP)
        pthread_rwlock_init(&self.lock, &kind)
        pthread_rwlockattr_destroy(&kind)
        pthread_mutex_init(&self.faults_lock, NULL)

    def __init__(self, bint bypass=True, uint64_t limit=MAX_MAPPINGS):
        self._bypass, self.limit = bypass, limit
        self.endpoints, self.domains = {}, {}

    def __dealloc__(self):
        pthread_rwlock_destroy(&self.lock)
        pthread_mutex_destroy(&self.faults_lock)

    def add_endpoint(self, uint32_t number, str name not None):
        """A new Endpoint, in no domain. Raises ValueError for a number that is taken."""
        if number in self.endpoints:
            raise ValueError(f"endpoint {number:#x} is {self.endpoints[number].name}")
        self.endpoints[number] = endpoint = Endpoint(self, number, name)
        return endpoint

    @property
    def bypass(self):
        return self._bypass

    @bypass.setter
    def bypass(self, bint wanted):
        cdef Endpoint endpoint
        cdef list endpoints = list(self.endpoints.values())
        pthread_rwlock_wrlock(&self.lock)
        self._bypass = wanted
        for endpoint in endpoints:
            endpoint.generation += 1
        pthread_rwlock_unlock(&self.lock)

    def attach(self, Endpoint endpoint not None, uint32_t number, bint bypass=False):
        """Put ``endpoint`` in domain ``number``, a new one where there is none, and out of the one it was in."""
        cdef Domain domain = self.domains.get(number)
        cdef Domain before = endpoint.domain
        if before is not None and before is domain:
            return
        if before is not None:
            self.detach(endpoint)
        if domain is None:
            domain = self.domains[number] = Domain(number, bypass)
        domain.endpoints.append(endpoint)
        pthread_rwlock_wrlock(&self.lock)
        endpoint.domain = domain
        endpoint.generation += 1
        pthread_rwlock_unlock(&self.lock)

    def detach(self, Endpoint endpoint not None):
        """Out of its domain, which ends with its last endpoint."""
        cdef Domain domain = endpoint.domain  # keeps it alive until after the lock
        if domain is None:
            return
        pthread_rwlock_wrlock(&self.lock)
        endpoint.domain = None
        endpoint.generation += 1
        pthread_rwlock_unlock(&self.lock)
        domain.endpoints.remove(endpoint)
        if not domain.endpoints:
            del self.domains[domain.number]

    def map(self, Domain domain not None, uint64_t first, uint64_t last, uint64_t gpa, uint32_t access):
        """0, -EEXIST where some of [first, last] is mapped, -ENOMEM."""
        cdef int result
        if sum(each.mappings.count for each in self.domains.values()) >= self.limit:
            return -ENOMEM
        pthread_rwlock_wrlock(&self.lock)
        result = domain.mappings.add(first, last, gpa, access)
        pthread_rwlock_unlock(&self.lock)
        return result

    def unmap(self, Domain domain not None, uint64_t first, uint64_t last):
        """How many mappings went; -ERANGE, and none did, where one is not whole in [first, last]."""
        cdef long long result
        cdef Endpoint endpoint
        cdef list endpoints = domain.endpoints
        pthread_rwlock_wrlock(&self.lock)
        result = domain.mappings.remove(first, last)
        if result > 0:
            for endpoint in endpoints:
                endpoint.generation += 1
        pthread_rwlock_unlock(&self.lock)
        return result

    def reset(self):
        """All endpoints in no domain, and no faults; ``bypass`` stays."""
        for endpoint in self.endpoints.values():
            self.detach(endpoint)
        self.take_faults()

    # -- faults -----------------------------------------------------------------------------------

    cdef void note(self, Fault *fault) noexcept nogil:
        """On any thread; one that the driver is too slow for is only counted."""
        pthread_mutex_lock(&self.faults_lock)
        if self.fault_count == MAX_FAULTS:
            self.dropped += 1
        else:
            self.faults[(self.first_fault + self.fault_count) % MAX_FAULTS] = fault[0]
            self.fault_count += 1
        pthread_mutex_unlock(&self.faults_lock)
        eventfd_signal(self.fault_fd)

    @property
    def faults_waiting(self):
        return self.fault_count

    def take_fault(self):
        """The oldest (reason, access, endpoint, iova), or None."""
        cdef Fault fault
        cdef bint any
        pthread_mutex_lock(&self.faults_lock)
        any = self.fault_count > 0
        if any:
            fault = self.faults[self.first_fault]
            self.first_fault = (self.first_fault + 1) % MAX_FAULTS
            self.fault_count -= 1
        pthread_mutex_unlock(&self.faults_lock)
        return (fault.reason, fault.access, fault.endpoint, fault.iova) if any else None

    def take_faults(self):
        """All that wait."""
        return list(iter(self.take_fault, None))
