"""Dependencies: their licences are known ones, and the lock that CI installs from names and hashes all of them."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import loracast

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ALLOWED = re.compile(
    r"0BSD|apache( software)?( license|-2\.0)?,?( version)?( 2\.0)?( license)?|bsd( license)?|bsd[- ][234][- ]clause|"
    r"[234]-clause bsd license|bsl-1\.0|cc0-1\.0|"
    r"cnri-python|dfsg approved|isc( license( \(iscl\))?)?|llvm-exception|(the )?mit( license)?( \(mit\))?|mit-(0|cmu)|"
    r"psf(l|-2\.0)?|python software foundation license|unlicense|the unlicense \(unlicense\)|zlib|zpl-2\.1|"
    r"mpl-2\.0|mozilla public license 2\.0 \(mpl 2\.0\)",  # copyleft for a package's own files alone
    re.IGNORECASE,
)
CUDA = re.compile(r"(nvidia|cuda)-.+")
"""Libraries under NVIDIA's own terms, which PyTorch's builds for NVIDIA's GPUs bring; its builds for CPUs do not."""
READ_BY_HAND = {
    "chardet": ["GNU Lesser General Public License v2 or later (LGPLv2+)"],  # comes with lm-eval
    "docutils": [
        "Public Domain",
        "BSD License",
        "GNU General Public License (GPL)",
    ],  # with twine; the last of one file
    "fpdf2": ["LGPL-3.0-only"],  # makes the tests' PDFs
    "torchao": ["none is named"],  # its file is the BSD 3-clause licence
}
"""What extras bring besides, as it names its licence; no plain `pip install loracast` does."""


def needed(requirements: list[str]) -> tuple[dict[str, metadata.Distribution], set[str]]:
    """Distributions that requirements bring along, by name, and the names of those that are not installed."""
    found: dict[str, metadata.Distribution] = {}
    missing: set[str] = set()
    todo, done = [Requirement(text) for text in requirements], set()
    while todo:
        one = todo.pop()
        name, extras = canonicalize_name(one.name), ["", *sorted(one.extras)]
        if (name, *extras) in done:
            continue
        done.add((name, *extras))
        try:
            found[name] = metadata.distribution(one.name)
        except metadata.PackageNotFoundError:
            missing.add(name)
            continue
        for wanted in map(Requirement, found[name].requires or ()):
            if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(wanted)
    return found, missing


def licences(distribution: metadata.Distribution) -> list[str]:
    """The licences that a distribution is under, as it names them; the first line where it quotes the text."""
    about = distribution.metadata
    if expression := about.get("License-Expression"):
        return [part.strip("() ") for part in re.split(r" AND | OR | WITH ", expression)]
    classifiers = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or () if c.startswith("License ::")]
    return classifiers or re.split(r" AND | OR ", (about.get("License") or "none is named").strip().splitlines()[0])


def refused(distributions: dict[str, metadata.Distribution]) -> dict[str, list[str]]:
    """Distributions with a licence that is on no list."""
    of = {name: licences(found) for name, found in distributions.items() if name != "loracast" and not CUDA.match(name)}
    return {name: there for name, there in of.items() if not all(ALLOWED.fullmatch(one) for one in there)}


def test_what_users_install_is_under_permissive_licences():
    found, missing = needed(PROJECT["dependencies"])
    assert not missing and len(found) > 40
    assert refused(found) == {}


def test_the_licences_of_the_extras_are_known():
    found, _ = needed([one for name, extra in EXTRAS.items() if name != "frameworks" for one in extra])
    assert {"pytest", "peft", "timm"} <= found.keys()
    others = refused(found)
    assert others == {name: READ_BY_HAND.get(name) for name in others}


@pytest.mark.parametrize(
    "licence", ["GPL-3.0-only", "AGPL-3.0-or-later", "Other/Proprietary License", "CC-BY-NC-4.0", ""]
)
def test_another_licence_is_found(licence, tmp_path):
    about = tmp_path / "evil-1.0.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text(f"Metadata-Version: 2.1\nName: evil\nVersion: 1.0\nLicense: {licence}\n")
    assert refused({"evil": metadata.Distribution.at(about.parent)}).keys() == {"evil"}


def test_the_lock_names_and_hashes_every_dependency_but_torch():
    lock = (ROOT / "requirements" / "ci.txt").read_text(encoding="utf-8")
    assert "://" not in lock and "+cpu" not in lock and "index-url" not in lock
    pins: dict[str, list[str]] = {}
    for entry in lock.replace("\\\n", " ").splitlines():
        if entry.startswith("#"):
            continue
        requirement, *hashes = entry.split("--hash=")
        name, version = re.fullmatch(r"([a-z0-9-]+)==([^ ;]+)( ;.*)?", requirement.strip()).group(1, 2)
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", one.strip()) for one in hashes), name
        pins.setdefault(name, []).append(version)
    direct = [*PROJECT["dependencies"], *(one for extra in EXTRAS.values() for one in extra)]
    by_name = [*EXTRAS["frameworks"], *EXTRAS["ray"]]  # CI installs those for a few tests
    own = {"loracast", "torch", *(Requirement(one).name for one in by_name)}
    for requirement in map(Requirement, direct):
        if (name := canonicalize_name(requirement.name)) not in own:
            assert any(requirement.specifier.contains(version) for version in pins[name]), requirement


def test_the_conda_recipe_has_the_version_and_the_dependencies_of_the_package():
    recipe = yaml.safe_load((ROOT / "packaging" / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["context"]["version"] == loracast.__version__
    assert PROJECT["requires-python"] == f">={recipe['context']['python_min']}"
    theirs = {  # names there
        "huggingface-hub": "huggingface_hub", "prometheus-client": "prometheus_client", "torch": "pytorch",
    }  # fmt: skip
    wanted = {theirs.get(one.name, one.name): one.specifier for one in map(Requirement, PROJECT["dependencies"])}
    found = [one.partition(" ")[::2] for one in recipe["requirements"]["run"] if not one.startswith("python >")]
    assert {name: SpecifierSet(bounds) for name, bounds in found} == wanted
    [script] = recipe["build"]["python"]["entry_points"]
    assert script == f"loracast = {PROJECT['scripts']['loracast']}"
