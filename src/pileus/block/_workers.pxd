from pileus._posix cimport pthread_mutex_t


cdef struct Job:
    # Stands first in the struct that it is a part of.
    Job *next
    void (*run)(Job *job) noexcept nogil


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_cond_t:
        pass
    ctypedef unsigned long pthread_t


cdef struct Workers:
    pthread_mutex_t mutex
    pthread_cond_t wake         # there is a job, or an end
    pthread_cond_t ended        # a thread has
    Job *first                  # to do, the oldest
    Job *last
    Job *done                   # the newest
    int done_fd                 # eventfd, readable once ``done`` holds something
    int most
    int threads
    int idle
    bint closing


# Threads, ``most`` of them, which start as they are needed. One owner calls all of these. NULL without memory.
cdef Workers *workers_new(int most, int done_fd) noexcept nogil
# 0, or -errno where there is no thread to do it.
cdef int workers_submit(Workers *workers, Job *job) noexcept nogil
# All jobs done since the last call, linked by ``next``.
cdef Job *workers_done(Workers *workers) noexcept nogil
# Ends the threads and frees; only when no job is under way.
cdef void workers_free(Workers *workers) noexcept nogil
