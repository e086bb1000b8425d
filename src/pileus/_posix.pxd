"""What the compiled parts share: a mutex, and eventfds that are signalled without the GIL."""

from libc.stdint cimport uint64_t


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)


cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *data, size_t length)
    ssize_t write(int fd, const void *data, size_t length)


cdef inline void eventfd_signal(int fd) noexcept nogil:
    """Make ``fd`` readable, or raise the interrupt it is an irqfd of; nothing for a negative fd."""
    cdef uint64_t one = 1
    if fd >= 0:
        write(fd, &one, sizeof(one))


cdef inline void eventfd_consume(int fd) noexcept nogil:
    """Make a non-blocking ``fd`` unreadable again."""
    cdef uint64_t count
    read(fd, &count, sizeof(count))
