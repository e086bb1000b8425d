"""A few threads for what would block: no Python in them, and none of them until there is something to do."""

from libc.stdlib cimport calloc, free

from pileus._posix cimport (
    eventfd_signal,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_attr_t:
        pass
    int pthread_attr_init(pthread_attr_t *)
    int pthread_attr_destroy(pthread_attr_t *)
    int pthread_attr_setstacksize(pthread_attr_t *, size_t size)
    int pthread_create(pthread_t *, pthread_attr_t *, void *(*main)(void *) noexcept nogil, void *)
    int pthread_detach(pthread_t)
    int pthread_cond_init(pthread_cond_t *, void *)
    int pthread_cond_destroy(pthread_cond_t *)
    int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *)
    int pthread_cond_signal(pthread_cond_t *)
    int pthread_cond_broadcast(pthread_cond_t *)


cdef enum:
    STACK_SIZE = 256 << 10  # bytes


cdef Workers *workers_new(int most, int done_fd) noexcept nogil:
    cdef Workers *workers = <Workers *>calloc(1, sizeof(Workers))
    if workers != NULL:
        pthread_mutex_init(&workers.mutex, NULL)
        pthread_cond_init(&workers.wake, NULL)
        pthread_cond_init(&workers.ended, NULL)
        workers.most, workers.done_fd = most, done_fd
    return workers


cdef int workers_submit(Workers *workers, Job *job) noexcept nogil:
    cdef int rc = 0
    pthread_mutex_lock(&workers.mutex)
    if workers.idle == 0 and workers.threads < workers.most:
        rc = _start(workers)
        if workers.threads:
            rc = 0  # those that are there will do
    if rc == 0:
        job.next = NULL
        if workers.first == NULL:
            workers.first = job
        else:
            workers.last.next = job
        workers.last = job
        if workers.idle:
            workers.idle -= 1  # one that wakes up is not there for the next job
            pthread_cond_signal(&workers.wake)
    pthread_mutex_unlock(&workers.mutex)
    return rc


cdef Job *workers_done(Workers *workers) noexcept nogil:
    cdef Job *done
    if workers == NULL:
        return NULL
    pthread_mutex_lock(&workers.mutex)
    done, workers.done = workers.done, NULL
    pthread_mutex_unlock(&workers.mutex)
    return done


cdef void workers_free(Workers *workers) noexcept nogil:
    if workers == NULL:
        return
    pthread_mutex_lock(&workers.mutex)
    workers.closing = True
    pthread_cond_broadcast(&workers.wake)
    while workers.threads:
        pthread_cond_wait(&workers.ended, &workers.mutex)
    pthread_mutex_unlock(&workers.mutex)
    pthread_cond_destroy(&workers.ended)
    pthread_cond_destroy(&workers.wake)
    pthread_mutex_destroy(&workers.mutex)
    free(workers)


cdef int _start(Workers *workers) noexcept nogil:
    cdef pthread_attr_t about
    cdef pthread_t thread
    cdef int rc
    pthread_attr_init(&about)
    pthread_attr_setstacksize(&about, STACK_SIZE)
    rc = pthread_create(&thread, &about, _main, workers)
    pthread_attr_destroy(&about)
    if rc == 0:
        pthread_detach(thread)
        workers.threads += 1
    return -rc


cdef void *_main(void *argument) noexcept nogil:
    cdef Workers *workers = <Workers *>argument
    cdef Job *job
    pthread_mutex_lock(&workers.mutex)
    while True:
        while workers.first == NULL and not workers.closing:
            workers.idle += 1
            pthread_cond_wait(&workers.wake, &workers.mutex)
        job = workers.first
        if job == NULL:
            break
        workers.first = job.next
        pthread_mutex_unlock(&workers.mutex)
        job.run(job)
        pthread_mutex_lock(&workers.mutex)
        job.next, workers.done = workers.done, job
        if job.next == NULL:
            eventfd_signal(workers.done_fd)
    workers.threads -= 1
    pthread_cond_signal(&workers.ended)
    pthread_mutex_unlock(&workers.mutex)
    return NULL
