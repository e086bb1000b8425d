"""A function on the PCI bus: its configuration space, BARs and MSI-X vectors."""

from pileus.pci.bar import Bar
from pileus.pci.capability import Capabilities
from pileus.pci.config_space import ConfigSpace


class Function:
    """What ``PciBus.add`` takes. ``name`` is for messages; ``config`` has the ids."""

    def __init__(self, name: str, config: ConfigSpace) -> None:
        self.name = name
        self.config = config
        self.capabilities = Capabilities(config)
        self.bars: list[Bar] = []

    def add_bar(self, bar: Bar) -> Bar:
        bar.define(self.config)
        self.bars.append(bar)
        return bar

    def bar(self, index: int) -> Bar | None:
        """The BAR whose first register is ``index``."""
        return next((bar for bar in self.bars if bar.index == index), None)
