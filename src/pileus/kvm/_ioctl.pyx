"""One ioctl, checked: the error of a failed one names it."""

from libc.errno cimport EINTR, errno

from pileus.kvm cimport _uapi
from pileus.errors import KvmError


cdef int call(int fd, unsigned long request, void *argument, str name) except -1:
    """The ioctl's own result. Raises KvmError with ``name``."""
    return call_value(fd, request, <unsigned long>argument, name)


cdef int call_value(int fd, unsigned long request, unsigned long argument, str name) except -1:
    cdef int result, error = EINTR
    while error == EINTR:
        with nogil:
            result = _uapi.ioctl(fd, request, argument)
            error = errno if result < 0 else 0
    if result < 0:
        raise KvmError(name, error)
    return result
