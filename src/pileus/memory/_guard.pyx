"""Surviving a peer that truncates a file which we have mapped: SIGBUS would end the process.

The page that is missing is replaced by one of our own, full of zeroes, and whoever touched it goes on; what
the peer sees in its file is its own affair from then on. ``install`` names an eventfd that is told, so that
the conversation with such a peer can be ended. System calls that meet such a page fail with EFAULT by
themselves.

Not covered: a fault anywhere else, which does what it did before.
"""

import os

from libc.errno cimport errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memset

from pileus._posix cimport eventfd_signal


cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    ctypedef struct siginfo_t:
        void *si_addr
    struct sigaction_t "sigaction":
        void (*sa_sigaction)(int, siginfo_t *, void *) noexcept nogil
        int sa_flags
        sigset_t sa_mask
    int c_sigaction "sigaction"(int number, const sigaction_t *action, sigaction_t *before)
    int SIGBUS, SA_SIGINFO, SA_ONSTACK


cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t size, int protection, int flags, int fd, long offset)
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED
    void *MAP_FAILED


cdef enum:
    MOST = 256


cdef struct Guarded:
    uintptr_t start
    uint64_t size           # 0: a free place
    uint64_t page_size


cdef Guarded[MOST] guarded  # changed under the GIL, read by the handler at any time
cdef sigaction_t before
cdef bint installed = False
cdef int told_fd = -1
cdef int fault_count = 0


def install(int eventfd):
    """Survive such faults from now on; ``eventfd``, which stays open, is told of each. Once per process."""
    global installed, told_fd
    cdef sigaction_t action
    told_fd = eventfd
    if installed:
        return
    memset(&action, 0, sizeof(action))
    action.sa_sigaction = _on_sigbus
    action.sa_flags = SA_SIGINFO | SA_ONSTACK
    if c_sigaction(SIGBUS, &action, &before) < 0:
        raise OSError(errno, os.strerror(errno))
    installed = True


def faults():
    """How many there were."""
    return fault_count


cdef int guard(void *base, uint64_t size, uint64_t page_size) noexcept nogil:
    cdef int index
    for index in range(MOST):
        if guarded[index].size == 0:
            guarded[index].start, guarded[index].page_size = <uintptr_t>base, page_size
            guarded[index].size = size
            return 0
    return -1


cdef void unguard(void *base) noexcept nogil:
    cdef int index
    for index in range(MOST):
        if guarded[index].size and guarded[index].start == <uintptr_t>base:
            guarded[index].size = 0


cdef void _on_sigbus(int number, siginfo_t *info, void *context) noexcept nogil:
    """Nothing here but system calls that a handler may make, and loads of what is plain memory."""
    global fault_count
    cdef uintptr_t place = <uintptr_t>info.si_addr
    cdef uintptr_t page
    cdef int index, kept = errno
    for index in range(MOST):
        if guarded[index].size and place - guarded[index].start < guarded[index].size:
            page = place & ~<uintptr_t>(guarded[index].page_size - 1)
            if mmap(
                <void *>page, guarded[index].page_size, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0,
            ) == MAP_FAILED:
                break
            fault_count += 1
            eventfd_signal(told_fd)
            _set_errno(kept)
            return
    c_sigaction(SIGBUS, &before, NULL)  # it happens again, and does what it does


cdef extern from *:
    """
    #include <errno.h>
    #define pileus_set_errno(number) (errno = (number))
    """
    void _set_errno "pileus_set_errno"(int number) nogil
