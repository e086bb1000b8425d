cdef class Engine:
    cdef readonly str name
    cdef readonly int stop_fd       # eventfd: readable once the thread is to end
    cdef readonly bint running
    cdef object _ended              # a lock, held while the thread lives
    cdef object _failed

    # Serve until stop_fd is readable. 0, or a negative errno when nothing more can be served.
    cdef int serve(self) noexcept nogil
