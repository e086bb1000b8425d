"""Whatever a guest does, the compiled UART answers as its slow twin."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pileus.console._sink import PENDING_MAX

from .conftest import Guest
from .uart_twin import Twin

PIPE_MAX = 64 * 1024

STEP = st.one_of(
    st.tuples(st.just("load"), st.integers(0, 7)),
    st.tuples(st.just("store"), st.integers(0, 7), st.integers(0, 255)),
    st.tuples(st.just("store"), st.sampled_from([0, 1, 2, 4]), st.sampled_from([0, 1, 2, 3, 7, 16, 18])),
    st.tuples(st.just("feed"), st.binary(max_size=40)),
)
STEPS = st.lists(STEP, max_size=60)
RELEASE = st.tuples(st.just("release"))  # the host goes away, so nothing is full any more


def step_both(guest: Guest, twin: Twin, step: tuple[object, ...]) -> None:
    match step:
        case ("load", int(register)):
            assert guest.inb(register) == twin.load(register), step
        case ("store", int(register), int(value)):
            guest.outb(register, value)
            twin.store(register, value)
        case ("feed", bytes(data)):
            guest.serial.feed(data)
            twin.feed(data)
        case ("release",):
            guest.sink.detach()
            guest.serial.output_ready()
            twin.make_room(None)


def compare(guest: Guest, twin: Twin, steps: list[tuple[object, ...]]) -> None:
    for step in steps:
        edges = twin.edges
        step_both(guest, twin, step)
        assert guest.edges() == twin.edges - edges, step
    state = guest.serial.state()
    assert state["wire"] == bytes(twin.wire)
    assert state["looped"] == bytes(twin.looped)
    assert state["sending"] == bytes(twin.sending)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_with_a_host_that_reads(steps: list[tuple[object, ...]]) -> None:
    guest, twin = Guest(), Twin()
    try:
        compare(guest, twin, steps)
        assert guest.read_output() == bytes(twin.out)
    finally:
        guest.close()


@settings(max_examples=100, deadline=None)
@given(st.lists(STEP | RELEASE, max_size=60))
def test_with_a_host_that_is_full_until_it_goes_away(steps: list[tuple[object, ...]]) -> None:
    guest, twin = Guest(), Twin()
    guest.sink.write(bytes(PIPE_MAX + PENDING_MAX))
    assert guest.sink.write(b"x") == 0
    twin.capacity = 0
    try:
        compare(guest, twin, steps)
    finally:
        guest.close()
