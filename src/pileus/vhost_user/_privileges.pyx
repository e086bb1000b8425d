"""Giving up what a back-end does not need once its file or TAP and its socket are open: capabilities, all of
them, and the chance to get others by executing a program (no_new_privs).

Source: prctl(2), capabilities(7)
"""

import os

from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from pileus.errors import HostError


cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d)
    int PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL


cdef extern from "<linux/capability.h>":
    ctypedef struct cap_user_header_t "struct __user_cap_header_struct":
        uint32_t version
        int pid
    ctypedef struct cap_user_data_t "struct __user_cap_data_struct":
        uint32_t effective, permitted, inheritable
    uint32_t _LINUX_CAPABILITY_VERSION_3


cdef extern from "<sys/syscall.h>":
    long SYS_capget, SYS_capset


cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)


cdef enum:
    MOST = 64


def drop(uint64_t kept=0):
    """For this thread and those it starts: call it before there are others. Raises HostError.

    ``kept`` are capabilities, a bit for each, that stay if they are there.
    """
    cdef cap_user_header_t header
    cdef cap_user_data_t data[2]
    cdef int number
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0:
        raise HostError("give up", "new privileges", OSError(errno, "prctl"))
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)  # kernels before 4.3 have none
    for number in range(MOST):
        if kept >> number & 1:
            continue
        prctl(PR_CAPBSET_DROP, number, 0, 0, 0)  # refused to who has no CAP_SETPCAP, and so nothing to lose
    memset(&header, 0, sizeof(header))
    memset(data, 0, sizeof(data))
    header.version = _LINUX_CAPABILITY_VERSION_3
    if kept:
        if syscall(SYS_capget, &header, data) < 0:
            raise HostError("give up", "capabilities", OSError(errno, "capget"))
        for number in range(2):
            data[number].effective &= <uint32_t>(kept >> 32 * number)
            data[number].permitted &= <uint32_t>(kept >> 32 * number)
            data[number].inheritable = 0
    if syscall(SYS_capset, &header, data) < 0:
        raise HostError("give up", "capabilities", OSError(errno, "capset"))
