"""What the ACPI tables and the MP table need to know of a machine."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Machine:
    """``apic_ids`` has one entry per vCPU that may ever be, in order; the first ``boot_vcpus`` start.

    ``devices`` are AML fragments for ``\\_SB``, ``tables`` whole further tables. ``mmconfig`` is the GPA of
    PCI configuration space and the last bus in it, or None without PCI. ``events`` says whether the host can
    tell the guest of any, its power button above all.
    """

    __slots__ = ("apic_ids", "boot_vcpus", "devices", "events", "mmconfig", "serial", "tables")

    def __init__(
        self,
        apic_ids: "Sequence[int]",
        boot_vcpus: int | None = None,
        *,
        serial: bool = True,
        events: bool = False,
        devices: "Sequence[bytes]" = (),
        tables: "Sequence[bytes]" = (),
        mmconfig: tuple[int, int] | None = None,
    ) -> None:
        self.apic_ids = apic_ids
        self.boot_vcpus = len(apic_ids) if boot_vcpus is None else boot_vcpus
        self.serial = serial
        self.events = events
        self.devices = devices
        self.tables = tables
        self.mmconfig = mmconfig
