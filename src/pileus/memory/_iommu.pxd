from libc.stdint cimport uint32_t, uint64_t

from pileus._posix cimport pthread_mutex_t
from pileus.memory._mappings cimport Mappings
from pileus.memory._space cimport Translation, Window


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_rwlock_t:
        pass


cdef enum:
    MAX_FAULTS = 64         # reports that wait for the driver


cdef struct Fault:
    int reason
    uint32_t access
    uint32_t endpoint
    uint64_t iova


cdef class Domain:
    cdef readonly uint32_t number
    cdef readonly bint bypass
    cdef readonly Mappings mappings
    cdef readonly list endpoints


cdef class Endpoint(Translation):
    cdef readonly uint32_t number
    cdef readonly str name
    cdef readonly Iommu iommu
    cdef readonly Domain domain     # None: attached to none


cdef class Iommu:
    cdef readonly dict endpoints    # by number
    cdef readonly dict domains      # those that endpoints are attached to, by number
    cdef readonly uint64_t dropped  # faults that nobody could be told of
    cdef public int fault_fd        # eventfd, signalled when a fault is noted; -1: none
    cdef bint _bypass
    cdef uint64_t limit             # mappings of all domains together
    cdef pthread_rwlock_t lock      # of all that ``Endpoint.find`` looks at
    cdef pthread_mutex_t faults_lock
    cdef Fault[MAX_FAULTS] faults
    cdef uint32_t first_fault, fault_count

    cdef void note(self, Fault *fault) noexcept nogil
