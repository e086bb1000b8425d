"""Requests to the VMM from other threads, and its answers.

The control loop takes them one after the other and is the only one to change the VM. What can be told
without it, ``view`` tells at once, however long the loop is busy.
"""

from pileus import log
from pileus.errors import PileusError
from pileus.vmm.operation import Operation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pileus.config.model import VmConfig
    from pileus.vmm.vmm import View, Vmm


class Outcome:
    """How a request ended: with a ``result``, or with the ``error`` that was raised."""

    __slots__ = ("error", "result")

    def __init__(self, result: object = None, error: Exception | None = None) -> None:
        self.result = result
        self.error = error


class Control:
    """The door to ``vmm`` for other threads."""

    def __init__(self, vmm: "Vmm") -> None:
        self._vmm = vmm

    @property
    def view(self) -> "View":
        """The VM as the last request that ended left it."""
        return self._vmm.view

    def submit(self, call: "Callable[[Vmm], object]", done: "Callable[[Outcome], None]") -> None:
        """Have ``call(vmm)`` made on the control loop, and then ``done(outcome)``, there, too.

        A call that begins a long operation is over when that is; others are made meanwhile.
        """

        def make() -> None:
            outcome = _outcome(call, self._vmm)
            if isinstance(outcome.result, Operation):
                outcome.result.then(lambda error: done(Outcome(error=error)))
            else:
                done(outcome)

        self._vmm.loop.post(make)


def _outcome(call: "Callable[[Vmm], object]", vmm: "Vmm") -> Outcome:
    try:
        return Outcome(call(vmm))
    except PileusError as error:
        return Outcome(error=error)
    except Exception as error:
        log.exception(error)
        return Outcome(error=error)


def create(vmm: "Vmm", config: "VmConfig") -> None:
    """A VM that a client made: the process stays when its guest powers off."""
    vmm.create(config)
    vmm.outlives_vm = True


def shutdown(vmm: "Vmm") -> None:
    """Delete the VM and end the process, with status 0."""
    try:
        vmm.delete()
    finally:
        vmm.finish(0)
