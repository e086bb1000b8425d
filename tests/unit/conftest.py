"""What more than one room's tests need."""

import pytest
from hypothesis import settings

from pileus.errors import HostError
from pileus.kvm.probe import check_host

settings.register_profile("shared machine", deadline=None)  # time says nothing about right and wrong
settings.load_profile("shared machine")


@pytest.fixture
def complete_kvm() -> None:
    """For what only a KVM on vmx or svm does; where the host's is none, the guest tier runs these tests."""
    try:
        check_host()
    except HostError as error:
        pytest.skip(str(error))
