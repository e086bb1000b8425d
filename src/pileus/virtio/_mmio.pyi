from pileus.bus import PythonDevice

class MmioWindow(PythonDevice):
    def set_config_pending(self, pending: bool) -> None: ...
