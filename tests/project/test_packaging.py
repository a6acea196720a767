"""The compose file and the Helm chart: well-formed, by their own readers where those are installed, and about this code."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from loracast.cli import app
from loracast.export import vllm_middleware

PACKAGING = Path(__file__).parents[2] / "packaging"
CHART = PACKAGING / "helm" / "loracast"
VALUES = {"store": "s3://bucket/library", "hosts": ["manuals.example.org"]}


@pytest.fixture
def compose() -> dict:
    return yaml.safe_load((PACKAGING / "compose.yaml").read_text(encoding="utf-8"))


def files() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(PACKAGING.rglob("*")) if path.is_file())


def test_services_name_each_other_and_share_what_they_must(compose):
    services = compose["services"]
    engines = re.search(r"--engine (\S+)", services["gateway"]["entrypoint"][2])[1].split(",")
    assert [url.removeprefix("http://").removesuffix(":8000") for url in engines] == ["vllm-1", "vllm-2"]
    mounts = {name: dict(v.split(":")[:2][::-1] for v in service["volumes"]) for name, service in services.items()}
    exports = {mounts[name]["/data/exports"] for name in ("gateway", "vllm-1", "vllm-2")}
    assert exports == {"exports"} and mounts["vllm-1"]["/cache"] != mounts["vllm-2"]["/cache"]
    assert {name for service in mounts.values() for name in service.values()} == {*compose["volumes"]}
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", ()))


def test_the_gateway_owns_the_exports_before_anybody_mounts_them(compose):
    services = compose["services"]
    first = services["base"]
    user = re.search(r"^USER (\S+)$", (PACKAGING.parent / "Containerfile").read_text(), re.M)[1]
    place = next(there for name, there in (volume.split(":")[:2] for volume in first["volumes"]) if name == "exports")
    assert first["user"] == "root" and first["entrypoint"][2].startswith(f"chown {user} {place} && ")
    assert services["gateway"].get("user", user) == user and services["gateway"]["image"] == first["image"]
    for name in services.keys() - {"base"}:
        assert services[name]["depends_on"]["base"] == {"condition": "service_completed_successfully"}


def test_what_they_say_to_loracast_exists():
    said = files()
    for path in {*re.findall(r"--middleware[= ](\S+)", said)}:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name) is vllm_middleware.LibraryMiddleware
    known = (vllm_middleware.STORE_VARIABLE, vllm_middleware.BYTES_VARIABLE, "LORACAST_API_KEYS", "LORACAST_HOME")
    assert {*re.findall(r"\bLORACAST_[A-Z_]+", said)} == {*known}
    used = {
        "serve": re.findall(r" (--(?:host|engine|allowed-host)) ", said),
        "store": re.findall(r"loracast store [^&\n]*?(--[a-z-]+)", said),
        "export-base": re.findall(r"loracast export-base (--[a-z-]+)", said),
    }
    for command, options in used.items():
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [command, "--help"]).output
        assert options and all(option in result for option in options), (command, options)


def test_compose_is_valid(compose):
    pytest.importorskip("compose_spec", reason="pip install compose-spec").PyCompose.from_json(json.dumps(compose))


def test_the_chart_lints_and_renders():
    helm = pytest.importorskip("helm_python", reason="pip install helm-python-sdk: Helm's own code")
    report = helm.lint(str(CHART), values=VALUES)
    assert not report["errors"] and all(message["severity"] == 1 for message in report["messages"])
    with helm.Chart.load(str(CHART)) as chart:
        made = chart.render(VALUES, name="demo", namespace="default")
        with pytest.raises(helm.HelmError, match="store"):
            chart.render({}, name="demo", namespace="default")
    deployment, service = (
        yaml.safe_load(made[f"loracast/templates/{kind}.yaml"]) for kind in ("deployment", "service")
    )
    pod = deployment["spec"]["template"]
    assert pod["metadata"]["labels"].items() >= service["spec"]["selector"].items()
    containers = {one["name"]: one for one in pod["spec"]["containers"]}
    mounts = [{m["mountPath"]: m["name"] for m in one["volumeMounts"]} for one in containers.values()]
    assert all(one["/data"] == "data" for one in mounts)
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert all({*one.values()} <= volumes for one in mounts)
    said = containers["gateway"]["command"][2]
    assert "--engine http://127.0.0.1:8001" in said and said.endswith("--allowed-host manuals.example.org")
    assert "--port=8001" in containers["vllm"]["args"]
    assert {"name": "LORACAST_STORE", "value": VALUES["store"]} in containers["vllm"]["env"]
