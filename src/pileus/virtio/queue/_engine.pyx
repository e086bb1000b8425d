"""A thread that serves virtqueues without the GIL: from DRIVER_OK until the device is reset."""

import _thread
import os

from pileus._posix cimport eventfd_consume


cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    pthread_t pthread_self()
    int pthread_setname_np(pthread_t thread, const char *name)

STACK_SIZE = 256 << 10
NAME_MAX = 15  # bytes of a thread's name, for the kernel


cdef class Engine:
    """Subclasses override ``serve``. ``failed(number)`` hears, on this thread, that serve gave up with -number."""

    def __cinit__(self, *_, **__):
        self.stop_fd = -1

    def __init__(self, str name, failed):
        self.name = name
        self._failed = failed
        self._ended = _thread.allocate_lock()
        self.stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def start(self):
        if self.running:
            raise RuntimeError(f"{self.name}: it is running")
        eventfd_consume(self.stop_fd)
        self._ended.acquire()
        before = _thread.stack_size(STACK_SIZE)
        try:
            _thread.start_new_thread(self._main, ())
            self.running = True
        except BaseException:
            self._ended.release()
            raise
        finally:
            _thread.stack_size(before)

    def stop(self):
        """Returns when ``serve`` has, with what it had under way; its thread is then about to end.

        Harmless if it never started.
        """
        if self.running:
            os.eventfd_write(self.stop_fd, 1)
            self._ended.acquire()
            self._ended.release()
            self.running = False

    def close(self):
        self.stop()
        if self.stop_fd >= 0:
            os.close(self.stop_fd)
            self.stop_fd = -1

    def _main(self):
        cdef int result
        cdef bytes name = self.name.encode()[:NAME_MAX]
        try:
            pthread_setname_np(pthread_self(), name)
            with nogil:
                result = self.serve()
            if result < 0:
                self._failed(-result)
        finally:
            self._ended.release()

    cdef int serve(self) noexcept nogil:
        return 0
