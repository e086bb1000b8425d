"""Clusters that no table refers to any more, until nobody reads or writes them either.

Extents that are out are only counted, so they end all together: at a moment without any, all that was given
up before is quiet. Epochs tell before from after.
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport free, realloc


cdef enum:
    RUNS_MAX = 1 << 16  # remembered; what goes beyond is leaked, which a check of the image mends


cdef class Frees:
    def __cinit__(self):
        self._epoch = 1

    def __dealloc__(self):
        free(self._runs)

    cdef void add(self, uint64_t first, uint64_t count) noexcept nogil:
        cdef Run *last = NULL if self._head == self._tail else &self._runs[self._tail - 1]
        if last != NULL and last.epoch == self._epoch and last.first + last.count == first:
            last.count += count
            self.clusters += count
            return
        if self._tail == self._room and not _make_room(self):
            self.leaked += count
            return
        self._runs[self._tail].first = first
        self._runs[self._tail].count = count
        self._runs[self._tail].epoch = self._epoch
        self._tail += 1
        self.clusters += count

    cdef void all_quiet(self) noexcept nogil:
        if self._head != self._tail:
            self._quiet = self._epoch
            self._epoch += 1

    cdef bint take(self, Run *run) noexcept nogil:
        if self._head == self._tail or self._runs[self._head].epoch > self._quiet:
            return False
        run[0] = self._runs[self._head]
        self._head += 1
        self.clusters -= run.count
        if self._head == self._tail:
            self._head = self._tail = 0
        return True


cdef bint _make_room(Frees frees) noexcept nogil:
    cdef size_t room = max(frees._room * 2, <size_t>64), index
    cdef Run *runs
    if frees._head >= frees._room // 2 and frees._head:
        for index in range(frees._head, frees._tail):
            frees._runs[index - frees._head] = frees._runs[index]
        frees._tail -= frees._head
        frees._head = 0
        return True
    if room > RUNS_MAX:
        return False
    runs = <Run *>realloc(frees._runs, room * sizeof(Run))
    if runs == NULL:
        return False
    frees._runs, frees._room = runs, room
    return True
