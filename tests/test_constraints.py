"""`make` must install the same versions everywhere: constraints.txt pins everything that setup.cfg asks for."""

import configparser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = (line.split("==") for line in lines if line.strip() and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in found}


def requirements() -> list[Requirement]:
    """What `make` installs: the package, and the extra `dev` with the extras that it takes in."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    asked = config["options"]["install_requires"] + config["options.extras_require"]["dev"]
    return [Requirement(line) for line in sorted({line.strip() for line in asked.splitlines()}) if line]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_every_requirement_is_pinned_to_a_version_it_allows(requirement):
    version = pins().get(canonicalize_name(requirement.name))
    assert version, f"constraints.txt has no pin for {requirement.name}"
    assert requirement.specifier.contains(version), f"constraints.txt pins {requirement.name}=={version}"
