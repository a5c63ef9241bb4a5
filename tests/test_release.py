"""What is handed to registries: the wheel, the conda recipe, the entry for scverse, the citation."""

from __future__ import annotations

import re
import tomllib
import zlib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# where conda-forge's name is another than PyPI's
CONDA_NAMES = {
    "huggingface-hub": "huggingface_hub",
    "igraph": "python-igraph",
    "matplotlib": "matplotlib-base",
    "torch": "pytorch",
}


def read(name: str):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_all_versions_agree_and_follow_semver():
    version = PROJECT["version"]
    # https://semver.org, a release or a pre-release as PEP 440 and SemVer both write it
    assert re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-?(a|b|rc)\.?\d+)?", version)
    recipe = read("recipe/meta.yaml")
    assert recipe["package"]["version"] == version
    assert f"/histosge-{version}.tar.gz" in recipe["source"]["url"]
    assert read("docs/registry/meta.yaml")["version"] == version
    assert read("CITATION.cff")["version"] == version


def test_the_recipe_asks_for_what_the_package_asks_for():
    wanted = {}
    for requirement in PROJECT["dependencies"]:
        if ";" in requirement:  # for one Python only: a noarch recipe cannot say it, and leaves that Python out
            assert "python_version<'3.12'" in requirement
            continue
        name, bounds = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()
        wanted[CONDA_NAMES.get(name, name)] = bounds
    run = [line.split(" ", 1) for line in read("recipe/meta.yaml")["requirements"]["run"]]
    found = {one[0]: one[1] if len(one) > 1 else "" for one in run}
    assert found.pop("python") == ">=3.12"
    assert found == wanted


def test_the_recipe_describes_this_package():
    recipe = read("recipe/meta.yaml")
    assert recipe["build"]["noarch"] == "python"
    assert recipe["build"]["entry_points"] == [f"{k} = {v}" for k, v in PROJECT["scripts"].items()]
    assert recipe["about"]["license"] == PROJECT["license"]
    assert recipe["about"]["summary"] == PROJECT["description"]


def test_the_entry_for_scverse_has_what_its_schema_asks_for():
    entry = read("docs/registry/meta.yaml")
    required = {"name", "description", "project_home", "documentation_home", "install", "license", "tags", "version"}
    optional = {"tutorials_home", "publications", "logo", "test_command", "primary_category", "language"}
    assert required | {"category", "contact"} <= set(entry) <= required | {"category", "contact"} | optional
    assert entry["name"] == entry["install"]["pypi"] == PROJECT["name"]
    assert entry["license"] == PROJECT["license"]
    assert entry["category"] == "ecosystem"
    assert entry["project_home"] == PROJECT["urls"]["Source"]
    assert entry["documentation_home"].rstrip("/") == PROJECT["urls"]["Documentation"]
    for several in (entry["tags"], entry["contact"]):
        assert several
        assert len(set(several)) == len(several)


def test_the_citation_names_software_and_method():
    cited = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(cited)  # what the format requires
    assert cited["type"] == "software"
    assert cited["license"] == PROJECT["license"]
    (method,) = cited["references"]
    assert {"type", "title", "authors"} <= set(method)
    assert method["identifiers"][0]["value"] == "10.48550/arXiv.2407.20518"
    assert "arXiv:2407.20518" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_wheel_will_be_small_and_hold_the_package_alone():
    package = ROOT / "src" / "histosge"
    files = [p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert package / "py.typed" in files
    assert {p.suffix for p in files} <= {".py", ".typed", ".html"}
    assert sum(len(zlib.compress(p.read_bytes())) for p in files) < 1_000_000
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    assert wheel == {"packages": ["src/histosge"]}


@pytest.mark.parametrize("name", ["LICENSE", "CODE_OF_CONDUCT.md", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_what_the_checklist_asks_for_is_there(name):
    assert (ROOT / name).stat().st_size > 200
