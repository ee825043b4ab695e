"""What the tests of models share."""

import dataclasses

import pytest

from jadder.models import FAMILIES, Family, get_family


@pytest.fixture(params=sorted(FAMILIES))
def layers(request: pytest.FixtureRequest) -> Family:
    """Each family; adders by their literal definition, which compiles several times faster."""
    family = get_family(request.param)
    if family.name == "adder":
        return dataclasses.replace(family, implementation="reference")
    return family
