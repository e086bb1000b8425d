"""What happens when the file behind a mapping is cut short by another process, and we touch what is gone.

The kernel then sends SIGBUS, which ends a process. In a mapping that is guarded an empty page of our own takes
the place of the missing one, for good, and the loss is noted: its owner tells whom it concerns. System calls that
meet such a page fail with EFAULT by themselves. All else goes to whoever handled the signal before.

Source: mmap(2), "SIGBUS"; sigaction(2), BUS_ADRERR.
"""

import os

from libc.errno cimport errno
from libc.stdint cimport uint64_t
from libc.string cimport memset

from pileus._posix cimport eventfd_signal


cdef extern from "<signal.h>" nogil:
    ctypedef struct siginfo_t:
        int si_code
        void *si_addr
    ctypedef void (*Handler)(int) noexcept nogil
    ctypedef void (*LongHandler)(int, siginfo_t *, void *) noexcept nogil
    struct sigaction:
        Handler sa_handler
        LongHandler sa_sigaction
        int sa_flags
    int c_sigaction "sigaction"(int number, const sigaction *action, sigaction *old)
    int SIGBUS, BUS_ADRERR, SA_SIGINFO, SA_ONSTACK
    Handler SIG_DFL, SIG_IGN


cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t size, int protection, int flags, int fd, long offset)
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED
    void *MAP_FAILED


cdef extern from *:
    """
    #define pileus_set_errno(number) (errno = (number))
    """
    void set_errno "pileus_set_errno"(int number) nogil


cdef enum:
    MOST = 256


cdef struct Guarded:
    uint64_t base
    uint64_t size         # 0: a free entry
    uint64_t page_size
    bint lost


cdef Guarded entries[MOST]
cdef sigaction before
cdef bint installed = False
cdef int told_fd = -1
memset(entries, 0, sizeof(entries))


def tell(int eventfd):
    """Let ``eventfd``, which stays open, know of each loss from now on; -1: nobody. One per process."""
    global told_fd
    told_fd = eventfd


cdef int guard(void *base, uint64_t size, uint64_t page_size) except -2:
    cdef int number
    _install()
    for number in range(MOST):
        if entries[number].size == 0:
            entries[number].base, entries[number].page_size = <uint64_t>base, page_size
            entries[number].lost = False
            entries[number].size = size
            return number
    return -1


cdef void unguard(int number) noexcept nogil:
    entries[number].size = 0


cdef class Guard:
    """Looks after the mapping of ``size`` bytes at ``hva``, in pages of ``page_size``. Close it before unmapping."""

    cdef int number

    def __cinit__(self, uint64_t hva, uint64_t size, uint64_t page_size=4096):
        self.number = -1
        self.number = guard(<void *>hva, size, page_size)
        if self.number < 0:
            raise ValueError(f"at most {MOST} mappings are guarded")

    def __dealloc__(self):
        self.close()

    def close(self):
        if self.number >= 0:
            unguard(self.number)
            self.number = -1

    @property
    def lost(self):
        """Whether a page was missed since."""
        return self.number >= 0 and entries[self.number].lost


cdef _install():
    """Once: it stays, for it hands on what is not ours."""
    global installed
    cdef sigaction action
    if installed:
        return
    memset(&action, 0, sizeof(action))
    action.sa_sigaction = _on_sigbus
    action.sa_flags = SA_SIGINFO | SA_ONSTACK
    if c_sigaction(SIGBUS, &action, &before) < 0:
        raise OSError(errno, "sigaction")
    installed = True


cdef void _on_sigbus(int number, siginfo_t *info, void *context) noexcept nogil:
    """In the thread that touched the page, wherever it was: nothing here takes a lock."""
    cdef uint64_t address = <uint64_t>info.si_addr, page
    cdef Guarded *entry
    cdef int index, kept = errno
    if info.si_code == BUS_ADRERR:
        for index in range(MOST):
            entry = &entries[index]
            if address - entry.base < entry.size:
                page = address & ~(entry.page_size - 1)
                entry.lost = True
                if mmap(<void *>page, entry.page_size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED:
                    if told_fd >= 0:
                        eventfd_signal(told_fd)
                    set_errno(kept)
                    return
    if before.sa_flags & SA_SIGINFO:
        before.sa_sigaction(number, info, context)
    elif before.sa_handler == SIG_DFL or before.sa_handler == SIG_IGN:
        c_sigaction(number, &before, NULL)  # the access is tried again, and ends the process as it would have
    else:
        before.sa_handler(number)
