"""Signals as a file descriptor, so that the control loop meets them like any other event."""

import os

from libc.errno cimport errno
from libc.stdint cimport uint32_t


cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    int sigemptyset(sigset_t *set)
    int sigaddset(sigset_t *set, int number)
    int pthread_sigmask(int how, const sigset_t *set, sigset_t *old)
    int SIG_BLOCK, SIG_SETMASK


cdef extern from "<sys/signalfd.h>" nogil:
    struct signalfd_siginfo:
        uint32_t ssi_signo
    int signalfd(int fd, const sigset_t *mask, int flags)
    int SFD_CLOEXEC, SFD_NONBLOCK


cdef class SignalFd:
    """Blocks ``numbers`` in this thread, and in the threads it starts from now on, and reports them at ``fd``."""

    cdef readonly int fd
    cdef sigset_t before

    def __cinit__(self, numbers):
        cdef sigset_t wanted
        sigemptyset(&wanted)
        for number in numbers:
            sigaddset(&wanted, number)
        self.fd = signalfd(-1, &wanted, SFD_CLOEXEC | SFD_NONBLOCK)
        if self.fd < 0:
            raise OSError(errno, os.strerror(errno))
        pthread_sigmask(SIG_BLOCK, &wanted, &self.before)

    def take(self):
        """The numbers of the signals that came since the last call."""
        taken = []
        cdef signalfd_siginfo info
        while True:
            try:
                data = os.read(self.fd, sizeof(info))
            except BlockingIOError:
                return taken
            taken.append(int.from_bytes(data[:4], "little"))

    def close(self):
        """Close the fd and let the signals through again; those that came meanwhile have had their effect."""
        if self.fd >= 0:
            self.take()
            os.close(self.fd)
            self.fd = -1
            pthread_sigmask(SIG_SETMASK, &self.before, NULL)
