from pileus.kvm cimport _uapi

cdef int call(int fd, unsigned long request, void *argument, str name) except -1
cdef int call_value(int fd, unsigned long request, unsigned long argument, str name) except -1
