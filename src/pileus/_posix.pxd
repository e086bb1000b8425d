"""What the compiled parts share: a mutex, eventfds signalled without the GIL, loads and stores in order."""

from libc.stdint cimport uint8_t, uint16_t, uint64_t


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


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len


cdef extern from *:
    """
    #define pileus_load_u16(place) __atomic_load_n((place), __ATOMIC_RELAXED)
    #define pileus_acquire_u16(place) __atomic_load_n((place), __ATOMIC_ACQUIRE)
    #define pileus_store_u16(place, value) __atomic_store_n((place), (value), __ATOMIC_RELAXED)
    #define pileus_release_u16(place, value) __atomic_store_n((place), (value), __ATOMIC_RELEASE)
    #define pileus_full_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    """
    uint16_t load_u16 "pileus_load_u16"(const uint16_t *place) nogil
    uint16_t load_acquire_u16 "pileus_acquire_u16"(const uint16_t *place) nogil
    void store_u16 "pileus_store_u16"(uint16_t *place, uint16_t value) nogil
    void store_release_u8 "pileus_release_u16"(uint8_t *place, uint8_t value) nogil
    void store_release_u16 "pileus_release_u16"(uint16_t *place, uint16_t value) nogil
    void full_fence "pileus_full_fence"() nogil
