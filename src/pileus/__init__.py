"""pileus: a virtual machine monitor for KVM."""

__version__ = "0.3.0.dev0"
