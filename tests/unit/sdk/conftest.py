"""The VMMs of the API's tests."""

from tests.unit.api.conftest import api, fake_vms, real_api

__all__ = ["api", "fake_vms", "real_api"]
