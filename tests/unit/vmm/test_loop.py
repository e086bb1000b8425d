"""The control loop.

Signals go to this thread only: one that was joined may still be there, without a mask, and end the process.
"""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from pileus.vmm._signals import SignalFd
from pileus.vmm.loop import READABLE, WRITABLE, Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def test_a_ready_fd_is_told_with_its_events(loop: Loop, pipe: tuple[int, int]) -> None:
    told: list[int] = []

    def ready(events: int) -> None:
        told.append(events)
        loop.stop()

    loop.watch(pipe[0], READABLE, ready)
    os.write(pipe[1], b"x")
    loop.run()
    assert told == [READABLE]


def test_changed_and_forgotten_fds_are_served_as_asked(loop: Loop, pipe: tuple[int, int]) -> None:
    told: list[str] = []
    loop.watch(pipe[0], READABLE, lambda _: told.append("read"))
    loop.watch(pipe[1], WRITABLE, lambda _: told.append("write"))
    loop.change(pipe[1], 0)
    loop.unwatch(pipe[0])
    loop.unwatch(pipe[0])
    os.write(pipe[1], b"x")
    loop.after(0.05, loop.stop)
    loop.run()
    assert told == []


def test_timers_come_in_the_order_they_are_due(loop: Loop) -> None:
    told: list[str] = []
    loop.after(0.03, loop.stop)
    loop.after(0.02, lambda: told.append("second"))
    loop.after(0.01, lambda: told.append("first"))
    loop.after(0.015, lambda: told.append("never")).cancel()
    loop.run()
    assert told == ["first", "second"]


def test_any_thread_may_post(loop: Loop) -> None:
    told: list[threading.Thread] = []

    def called() -> None:
        told.append(threading.current_thread())
        loop.stop()

    poster = threading.Thread(target=lambda: loop.post(called))
    poster.start()
    loop.run()
    poster.join()
    assert told == [threading.current_thread()]


def test_what_is_due_after_a_stop_waits_for_the_next_run(loop: Loop, pipe: tuple[int, int]) -> None:
    told: list[str] = []

    def stop(name: str) -> None:
        told.append(name)
        loop.stop()

    os.write(pipe[1], b"x")
    loop.watch(pipe[0], READABLE, lambda _: stop("fd"))
    loop.post(lambda: stop("first post"))
    loop.post(lambda: stop("second post"))
    loop.after(0, lambda: stop("timer"))
    for runs in range(1, 5):
        loop.run()
        assert len(told) == runs
        if told[-1] == "fd":
            loop.unwatch(pipe[0])
    assert sorted(told) == ["fd", "first post", "second post", "timer"]
    assert told.index("first post") < told.index("second post")


def test_a_call_that_posts_itself_lets_others_come(loop: Loop, pipe: tuple[int, int]) -> None:
    def again() -> None:
        loop.post(again)

    loop.watch(pipe[0], READABLE, lambda _: loop.stop())
    loop.post(again)
    os.write(pipe[1], b"x")
    loop.run()


def test_a_call_that_raises_ends_the_run_and_takes_no_other_with_it(loop: Loop) -> None:
    told: list[str] = []
    loop.post(lambda: told.append(str(1 // 0)))
    loop.post(lambda: told.append("second"))
    loop.post(loop.stop)
    with pytest.raises(ZeroDivisionError):
        loop.run()
    loop.run()
    assert told == ["second"]


def test_a_timer_that_sets_another_goes_on_at_its_time(loop: Loop) -> None:
    told: list[int] = []

    def tick() -> None:
        told.append(len(told))
        if len(told) < 3:
            loop.after(0, tick)
        else:
            loop.stop()

    loop.after(0, tick)
    loop.run()
    assert told == [0, 1, 2]


def test_an_fd_forgotten_by_an_earlier_callback_is_not_told(loop: Loop) -> None:
    """Both ends are ready in one poll; whichever comes first closes the other."""
    ends = os.pipe(), os.pipe()
    told: list[int] = []

    def ready(mine: int, other: int) -> None:
        told.append(mine)
        loop.unwatch(ends[other][0])
        loop.after(0.01, loop.stop)
        loop.unwatch(ends[mine][0])

    for mine, other in ((0, 1), (1, 0)):
        os.write(ends[mine][1], b"x")
        loop.watch(ends[mine][0], READABLE, lambda _, mine=mine, other=other: ready(mine, other))  # type: ignore[misc]
    loop.run()
    assert len(told) == 1
    for read_end, write_end in ends:
        os.close(read_end)
        os.close(write_end)


def test_a_closed_loop_leaves_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(10):
        Loop().close()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_second_signal_on_the_way_out_does_not_kill() -> None:
    signals = SignalFd([signal.SIGUSR1])
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)  # its default is to end the process
    signals.close()
    signals.close()


def test_threads_started_meanwhile_do_not_get_the_signals() -> None:
    masks: list[set[signal.Signals | int]] = []
    signals = SignalFd([signal.SIGUSR1])
    thread = threading.Thread(target=lambda: masks.append(set(signal.pthread_sigmask(signal.SIG_BLOCK, []))))
    thread.start()
    thread.join()
    signals.close()
    assert signal.SIGUSR1 in masks[0]


def test_signals_are_told_by_their_fd_and_then_let_through_again() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    signals = SignalFd([signal.SIGUSR1, signal.SIGUSR2])
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
    assert signals.take() == [signal.SIGUSR2]
    assert signals.take() == []
    signals.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
