"""The control loop."""

import os
import signal
import threading
from collections.abc import Iterator
from functools import partial

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


def test_nothing_that_is_ready_is_called_after_a_stop(loop: Loop, pipe: tuple[int, int]) -> None:
    told: list[str] = []
    loop.post(loop.stop)
    loop.post(lambda: told.append("posted"))
    loop.after(0, lambda: told.append("timer"))
    loop.watch(pipe[1], WRITABLE, lambda _: told.append("fd"))
    loop.run()
    assert "posted" not in told
    assert "timer" not in told


def test_what_a_stop_left_comes_with_the_next_run(loop: Loop) -> None:
    told: list[str] = []
    loop.post(loop.stop)
    loop.post(lambda: told.append("first"))
    loop.post(loop.stop)
    loop.post(lambda: told.append("second"))
    loop.run()
    assert told == []
    loop.run()
    assert told == ["first"]


def test_every_post_of_many_threads_arrives_in_its_threads_order(loop: Loop) -> None:
    told: list[tuple[int, int]] = []
    posts, threads = 200, 4

    def called(thread: int, number: int) -> None:
        told.append((thread, number))
        if len(told) == posts * threads:
            loop.stop()

    def post(thread: int) -> None:
        for number in range(posts):
            loop.post(partial(called, thread, number))

    posters = [threading.Thread(target=post, args=(index,)) for index in range(threads)]
    for poster in posters:
        poster.start()
    loop.run()
    for poster in posters:
        poster.join()
    for index in range(threads):
        assert [number for thread, number in told if thread == index] == list(range(posts))


def test_signals_are_told_by_their_fd_and_then_let_through_again() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    signals = SignalFd([signal.SIGUSR1, signal.SIGUSR2])
    os.kill(os.getpid(), signal.SIGUSR2)
    assert signals.take() == [signal.SIGUSR2]
    assert signals.take() == []
    signals.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
