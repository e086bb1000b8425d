"""Which release of Cloud Hypervisor pileus stands for: its clients choose by it what they use."""

COMPATIBLE = "51.1.0"
