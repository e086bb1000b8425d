from pileus.bus import PythonDevice

class ConfigTable:
    def add(self, devfn: int, data: bytearray, slow: bytearray) -> None: ...

class PortsFace(PythonDevice):
    address: int
    def __init__(self, table: ConfigTable) -> None: ...

class EcamFace(PythonDevice):
    def __init__(self, table: ConfigTable) -> None: ...
