"""Raw mode of one terminal, undone whatever ends the process.

Signals that end it are caught in C, because by then Python may be unable to run: the handler restores the
terminal, puts the former action back and raises the signal again. All it calls is async-signal-safe.
"""

from libc.errno cimport EBUSY, errno
from posix.signal cimport (
    SIG_BLOCK,
    SIG_SETMASK,
    sigaction,
    sigaction_t,
    sigaddset,
    sigemptyset,
    sigprocmask,
    sigset_t,
)
from posix.types cimport pid_t
from posix.unistd cimport getpgrp, getpid

from pileus._posix cimport eventfd_signal


cdef extern from "<termios.h>" nogil:
    struct termios:
        unsigned int c_iflag, c_oflag, c_cflag, c_lflag
        unsigned char *c_cc
    int tcgetattr(int, termios *)
    int tcsetattr(int, int, const termios *)
    void cfmakeraw(termios *)
    const int TCSADRAIN, TCSANOW, VMIN, VTIME
    const unsigned int ECHO, ICANON, ISIG


cdef extern from "<signal.h>" nogil:
    int raise_signal "raise" (int)
    const int SIGABRT, SIGBUS, SIGCONT, SIGFPE, SIGHUP, SIGILL, SIGINT, SIGQUIT, SIGSEGV, SIGSYS
    const int SIGTERM, SIGTTOU, SIGXCPU, SA_ONSTACK, SA_RESTART
    void (*SIG_DFL)(int) noexcept
    int pthread_sigmask(int, const sigset_t *, sigset_t *)


cdef extern from "<unistd.h>" nogil:
    pid_t tcgetpgrp(int)


cdef enum:
    SIGNALS = 65

# One terminal at a time: a process has one controlling terminal, and a handler has no other place to look.
cdef int terminal = -1      # -1: nothing to restore
cdef int resumed = -1       # eventfd, signalled when the process was continued
cdef pid_t owner            # a forked child leaves its parent's terminal alone
cdef bint saved_valid = False
cdef bint raw_now = False
cdef termios saved, raw
cdef sigaction_t[SIGNALS] before
cdef bint[SIGNALS] caught


cdef bint _background(int fd) noexcept nogil:
    """Whether another job has the terminal. One that is not our controlling terminal has no jobs."""
    cdef pid_t group = tcgetpgrp(fd)
    return group >= 0 and group != getpgrp()


cdef void _set(const termios *modes) noexcept nogil:
    """tcsetattr that is not stopped by SIGTTOU, whichever job has the terminal."""
    cdef sigset_t block, old
    sigemptyset(&block)
    sigaddset(&block, SIGTTOU)
    pthread_sigmask(SIG_BLOCK, &block, &old)
    tcsetattr(terminal, TCSANOW, modes)
    pthread_sigmask(SIG_SETMASK, &old, NULL)


cdef void _make_raw() noexcept nogil:
    """Not in the background: there the terminal is the shell's, or another program's.

    OPOST goes too. Guests send CR LF where they mean it, and a full-screen program in the guest moves down
    with a bare LF, which ONLCR would turn into a jump to the first column.
    """
    if _background(terminal):
        return
    if not saved_valid and not _save():
        return
    _set(&raw)
    global raw_now
    raw_now = True


cdef bint _save() noexcept nogil:
    global saved, raw, saved_valid
    if tcgetattr(terminal, &saved) < 0:
        return False
    raw = saved
    cfmakeraw(&raw)
    raw.c_cc[VMIN] = 1
    raw.c_cc[VTIME] = 0
    saved_valid = True
    return True


cdef bint _still_ours() noexcept nogil:
    cdef termios now
    return (
        tcgetattr(terminal, &now) == 0 and now.c_lflag == raw.c_lflag
        and now.c_iflag == raw.c_iflag and now.c_oflag == raw.c_oflag
    )


cdef void _restore() noexcept nogil:
    """In the background only if the modes are still ours: else another job has set its own since."""
    global raw_now
    if terminal < 0 or not raw_now or owner != getpid():
        return
    raw_now = False
    if not _background(terminal) or _still_ours():
        _set(&saved)


cdef void _end(int number) noexcept nogil:
    cdef int keep = errno
    _restore()
    sigaction(number, &before[number], NULL)
    raise_signal(number)    # arrives when this handler returns, until then it is blocked
    (&errno)[0] = keep


cdef void _continue(int number) noexcept nogil:
    """The shell had the terminal while we were stopped, and set its own modes."""
    cdef int keep = errno
    if terminal >= 0 and owner == getpid():
        _make_raw()
        eventfd_signal(resumed)
    (&errno)[0] = keep


cdef void _catch(int number, void (*handler)(int) noexcept nogil, bint unless_handled) noexcept:
    cdef sigaction_t action
    if caught[number] or sigaction(number, NULL, &before[number]) < 0:
        return
    if unless_handled and before[number].sa_handler != SIG_DFL:
        return
    action.sa_handler = <void (*)(int) noexcept>handler
    action.sa_flags = SA_ONSTACK | SA_RESTART
    sigemptyset(&action.sa_mask)
    caught[number] = sigaction(number, &action, NULL) == 0


cdef void _release(int number) noexcept:
    """Put the former action back, unless someone has put another one in place of ours."""
    cdef sigaction_t now
    if not caught[number]:
        return
    caught[number] = False
    sigaction(number, NULL, &now)
    if now.sa_handler == <void (*)(int) noexcept>_end or now.sa_handler == <void (*)(int) noexcept>_continue:
        sigaction(number, &before[number], NULL)


def enter_raw(int fd, int resumed_fd):
    """Make the terminal ``fd`` raw, now or when this job gets into the foreground.

    Signals ``resumed_fd`` after SIGCONT. Raises OSError if another terminal is raw already.
    """
    global terminal, owner, resumed, saved_valid
    if terminal >= 0:
        raise OSError(EBUSY, "another terminal is in use")
    terminal = fd
    resumed = resumed_fd
    owner = getpid()
    saved_valid = False
    for number in (SIGSEGV, SIGBUS, SIGABRT, SIGILL, SIGFPE, SIGSYS):
        _catch(number, _end, False)
    for number in (SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGXCPU):
        _catch(number, _end, True)
    _catch(SIGCONT, _continue, True)
    _make_raw()


def leave_raw():
    """Restore the terminal and the signals' actions. Nothing happens if none is raw."""
    global terminal, resumed
    _restore()
    for number in range(1, SIGNALS):
        _release(number)
    terminal = resumed = -1


def is_raw():
    return bool(raw_now)


def in_background(int fd):
    """Whether reading ``fd`` would stop this process with SIGTTIN."""
    return bool(_background(fd))
