"""The life of a VM: which call is possible when, and what it leads to. docs/api.md draws this table.

A call that fails leaves the state as it was; but a reboot whose new VM cannot be built ends in SHUTDOWN.
"""

from pileus.errors import StateError

NONE, CREATED, RUNNING, PAUSED, SHUTDOWN = "not created", "Created", "Running", "Paused", "Shutdown"

LIFE = {
    NONE: {"create": CREATED, "delete": NONE},
    CREATED: {"boot": RUNNING, "delete": NONE},
    RUNNING: {
        "pause": PAUSED,
        "shutdown": SHUTDOWN,
        "reboot": RUNNING,
        "delete": NONE,
        "press the power button of": RUNNING,
        "send an NMI to": RUNNING,
        "read the counters of": RUNNING,
        "dump the memory of": RUNNING,
        "cancel an operation of": RUNNING,
    },
    PAUSED: {
        "resume": RUNNING,
        "boot": RUNNING,  # as release 0.3: it resumes
        "shutdown": SHUTDOWN,
        "reboot": RUNNING,
        "delete": NONE,
        "read the counters of": PAUSED,
        "dump the memory of": PAUSED,
        "cancel an operation of": PAUSED,
    },
    SHUTDOWN: {"boot": RUNNING, "delete": NONE},
}

# What is possible in the middle of a long operation; the first three give it up.
MEANWHILE = {
    "shutdown",
    "reboot",
    "delete",
    "read the counters of",
    "cancel an operation of",
}


def step(state: str, event: str, operation: str = "") -> str:
    """The state that ``event`` leads to from ``state``. Raises StateError where it is not possible.

    ``operation`` is the name of what is under way.
    """
    try:
        after = LIFE[state][event]
    except KeyError:
        where = [name for name, events in LIFE.items() if event in events]
        raise StateError(event, state, f"it has to be {' or '.join(where)}") from None
    if operation and event not in MEANWHILE:
        raise StateError(event, f"in the middle of a {operation}", "that has to end, or to be cancelled")
    return after
