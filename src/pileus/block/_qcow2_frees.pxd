from libc.stdint cimport uint64_t


cdef struct Run:
    uint64_t first      # clusters
    uint64_t count
    uint64_t epoch      # when they were given up


cdef class Frees:
    # Not locked: its owner is.
    cdef readonly uint64_t clusters     # that wait
    cdef readonly uint64_t leaked       # clusters that there was no room to remember
    cdef Run *_runs
    cdef size_t _head, _tail, _room
    cdef uint64_t _epoch, _quiet

    cdef void add(self, uint64_t first, uint64_t count) noexcept nogil
    cdef void all_quiet(self) noexcept nogil    # nobody uses a cluster that was given up before
    cdef bint take(self, Run *run) noexcept nogil
