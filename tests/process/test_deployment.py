"""The deployment files say what is: real commands, options, variables, paths and files, and one set of times.

There may be no Docker here; whatever of it, of kubectl and of systemd is here has its say too. The balancers'
configurations run in test_balancers.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Network, ip_address
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
import yaml

from pgmcp.cli import main
from pgmcp.clock import Clock
from pgmcp.settings import Settings, variable
from tests.harness.cluster import everything, running_node
from tests.harness.compose import DOCKER, compose, in_checkout
from tests.harness.processes import REPOSITORY
from tests.harness.wheel import copied

URL = "postgresql://pgmcp:pgmcp@postgres:5432/pgmcp"
BASE, SAMPLE = DOCKER / "kubernetes" / "base", DOCKER / "kubernetes" / "sample"
SPARE = 10
"""Seconds that a process has after its drain before it is killed."""


def manifests() -> dict[str, dict[str, Any]]:
    """The Kubernetes objects by their kinds."""
    files = kustomization(BASE)["resources"]
    objects = [one for file in files for one in yaml.safe_load_all((BASE / file).read_text())]
    return {one["kind"]: one for one in objects}


def kustomization(folder: Path) -> dict[str, Any]:
    """What kustomize makes of the objects."""
    loaded = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def pod() -> dict[str, Any]:
    """What runs in Kubernetes."""
    spec = manifests()["Deployment"]["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def in_settings(folder: Path) -> dict[str, str]:
    """The variables that a kustomization gives to the nodes."""
    [generated] = kustomization(folder)["configMapGenerator"]
    assert generated["name"] == "pgmcp-settings"
    return dict(pair.split("=", 1) for pair in generated["literals"])


def unit() -> dict[str, list[tuple[str, str]]]:
    """The systemd unit by its sections; keys may occur more than once."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for line in (DOCKER / "systemd" / "pgmcp@.service").read_text().splitlines():
        if line.startswith("["):
            present = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            present.append((key, value))
    return sections


def service() -> dict[str, str]:
    """The unit's [Service]."""
    return dict(unit()["Service"])


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile."""
    text = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in lines]


def last(name: str) -> str:
    """The last instruction of a kind: the one of the image that is made."""
    return [value for word, value in instructions() if word == name][-1]


def containers() -> list[dict[str, Any]]:
    """Every container of the Kubernetes objects: the node, and what migrates before it starts."""
    return [*pod()["containers"], *pod()["initContainers"]]


def command_lines() -> Iterator[list[str]]:
    """Every pgmcp command in the files, without ``pgmcp``."""
    assert json.loads(last("ENTRYPOINT")) == ["pgmcp"]
    for each in compose()["services"].values():
        if each["image"] == "pgmcp":
            yield each["command"]
    for container in containers():
        assert container["image"] == "pgmcp"
        yield container["args"]
    program, *arguments = shlex.split(service()["ExecStart"].replace("%i", "node-1"))
    assert program.endswith("/bin/pgmcp")
    yield arguments


def environments() -> Iterator[dict[str, str]]:
    """Every set of PGMCP_ variables with which a node is started."""
    for each in compose()["services"].values():
        if each["image"] == "pgmcp" and each["command"][0] == "serve":
            yield {name: str(value or "") for name, value in each["environment"].items()}
    node, _ = containers()
    own = {one["name"]: one.get("value", "x") for one in node["env"] if one["name"].startswith("PGMCP_")}
    for settings in (in_settings(BASE), in_settings(BASE) | in_settings(SAMPLE)):
        yield settings | own
    yield {name: value for name, value in (pair.split("=", 1) for pair in shlex.split(last("ENV"))) if "PGMCP" in name}


@pytest.mark.parametrize("words", list(command_lines()), ids=" ".join)
def test_commands_are_real(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGMCP_DATABASE_URL", URL)
    command: click.Command = main
    words = list(words)
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, words
        command, _ = found, words.pop(0)
    command.make_context("pgmcp", words)  # parses them, and runs nothing


def test_variables_are_real() -> None:
    real = {variable(name) for name in Settings.model_fields} | {"PGMCP_WORKERS"}
    files = [path for path in DOCKER.rglob("*") if path.is_file()]
    named = {name for path in files for name in re.findall(r"\bPGMCP_[A-Z_]*[A-Z]\b", path.read_text())}
    assert named
    assert named <= real


@pytest.mark.parametrize("env", list(environments()))
def test_their_values_work(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    Settings()


def test_only_the_balancer_is_believed() -> None:
    for given in ({}, {"NGINX_ADDRESS": "10.1.2.3"}):
        services = compose(**given)["services"]
        [balancer] = [each["networks"]["default"]["ipv4_address"] for each in services.values() if "networks" in each]
        believed = {
            each["environment"]["PGMCP_FORWARDED_ALLOW_IPS"]
            for name, each in services.items()
            if name.startswith("node-")
        }
        assert believed == {balancer}
    [network] = compose()["networks"]["default"]["ipam"]["config"]
    inside, others = IPv4Network(network["subnet"]), IPv4Network(network["ip_range"])
    address = ip_address(compose()["services"]["nginx"]["networks"]["default"]["ipv4_address"])
    assert others.subnet_of(inside)
    assert address in inside
    assert address not in others, "Docker might give it to somebody else"
    for env in environments():
        assert "*" not in env.get("PGMCP_FORWARDED_ALLOW_IPS", "")
        assert "/" not in env.get("PGMCP_FORWARDED_ALLOW_IPS", "")


def test_every_kind_of_platform_waits_for_the_drain() -> None:
    defaults = Settings()
    expected = defaults.drain_notice + defaults.drain_limit + SPARE
    node, _ = containers()
    for env in environments():
        if "PGMCP_DRAIN_NOTICE" in env:
            assert float(env["PGMCP_DRAIN_NOTICE"]) + float(env["PGMCP_DRAIN_LIMIT"]) + SPARE == expected
    assert pod()["terminationGracePeriodSeconds"] == expected
    assert float(node["lifecycle"]["preStop"]["exec"]["command"][1]) < SPARE
    nodes = [each for name, each in compose()["services"].items() if name.startswith("node-")]
    assert {each["stop_grace_period"] for each in nodes} == {f"{expected:.0f}s"}
    assert float(service()["TimeoutStopSec"]) == expected
    assert {last("STOPSIGNAL"), service()["KillSignal"]} == {"SIGTERM"}


async def test_probes_get_answers(database: str, tmp_path: Path) -> None:
    node, _ = containers()
    paths = {probe: node[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    for file in (DOCKER / "haproxy").iterdir():
        [paths[file.name]] = re.findall(r"option httpchk GET (\S+)", file.read_text())
    async with (
        running_node(database, everything(), "n1", Clock()) as running,
        httpx.AsyncClient(trust_env=False, verify=False) as http,
    ):
        for path in set(paths.values()):
            assert (await http.get(f"{running.url}{path}")).status_code == 200
        port = running.url.rpartition(":")[2]
        for words, env in HEALTHY.items():
            assert await _health(tmp_path, words.format(port=port), env.format(port=port)) == 0, words
        assert await _health(tmp_path, "pgmcp serve x.py:mcp --port 1", port) != 0, "the option counts"
    assert await _health(tmp_path, "pgmcp serve x.py:mcp", port) != 0


HEALTHY = {
    "pgmcp serve x.py:mcp": "{port}",
    "tini -- pgmcp serve x.py:mcp --port {port} --host 127.0.0.1": "8000",
    "python /opt/pgmcp/bin/pgmcp serve --port=1 --host 0.0.0.0 --port={port} x.py:mcp": "8000",
}
"""Command lines of process 1 with PGMCP_PORT, of nodes that are well."""


async def _health(folder: Path, words: str, port: str) -> int:
    """Run the image's own health check against a node of this machine."""
    program, script = json.loads(last("HEALTHCHECK").partition(" CMD ")[2])
    assert program == "python"
    assert f"docker/livez.py {script}" in [value for word, value in instructions() if word == "COPY"]
    command_line = folder / "cmdline"
    command_line.write_text(words.replace(" ", "\0") + "\0")
    env = {**os.environ, "PGMCP_PORT": port, "PGMCP_HOST": "0.0.0.0"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-S", str(DOCKER / "livez.py"), str(command_line), env=env
    )
    return await asyncio.wait_for(process.wait(), 20)


def test_the_document_names_files_that_are_there() -> None:
    text = (REPOSITORY / "docs" / "deployment.md").read_text()
    named = re.findall(r"(?:--file|--kustomize) (\S+)", text)
    assert {"docker/compose.yaml", "docker/Dockerfile", "docker/kubernetes/sample"} <= set(named)
    assert all((REPOSITORY / name).exists() for name in named)


# -- the image -------------------------------------------------------------------------------------------------------


def test_the_image_is_small_and_runs_as_nobody_in_particular() -> None:
    stages = [value for word, value in instructions() if word == "FROM"]
    assert len(stages) == 2
    assert {stage.removesuffix(" AS build") for stage in stages} == {"${BASE}"}, "one argument pins them by digest"
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last("USER"))
    fetching = [
        value for word, value in instructions() if word == "RUN" and re.search(r"\bpip (install|wheel)\b", value)
    ]
    assert len(fetching) == 4
    assert all("--require-hashes" in value or "--no-index" in value for value in fetching)
    build = re.search(r'^requires = \["([\w-]+)', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    assert build is not None
    assert re.search(rf"^{build[1]}==\S+ \\\n +--hash=", (DOCKER / "requirements-build.txt").read_text(), re.MULTILINE)
    final = instructions()[max(n for n, (word, _) in enumerate(instructions()) if word == "FROM") :]
    assert [value.split()[0] for word, value in final if word == "COPY"] == ["--from=build"]
    assert json.loads(last("CMD")) == ["--help"]


def test_the_build_gets_what_it_copies_and_nothing_else() -> None:
    allowed = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    assert allowed[0] == "*"
    assert sorted(name.removeprefix("!") for name in allowed if name.startswith("!")) == sorted(copied())


def test_the_wheel_that_it_builds_is_whole(commands: Path, tmp_path: Path) -> None:
    """It runs from a folder that has no checkout, and brings its migrations and examples."""

    def run(*words: str) -> str:
        done = subprocess.run([*words], cwd=tmp_path, capture_output=True, check=False, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import pgmcp, pgmcp.cli.local_setup as f; print(pgmcp.__file__); print(f.example('everything'))"
    package, example = run(str(commands / "python"), "-c", where).split()
    assert Path(package).is_relative_to(commands.parent)
    assert Path(example.partition(":")[0]).is_relative_to(commands.parent)
    assert "create table" in run(str(commands / "pgmcp"), "db", "sql").lower()


# -- compose ---------------------------------------------------------------------------------------------------------


def test_compose_names_what_is_there() -> None:
    loaded = compose()
    services = loaded["services"]
    assert set(services) == {"postgres", "migrate", "node-1", "node-2", "node-3", "nginx", "pgbouncer"}
    assert services["postgres"]["image"].startswith("postgres:18")
    for name, each in services.items():
        needed = each.get("depends_on", {})
        assert set(needed) <= set(services), name
        for volume in each.get("volumes", ()):
            source = volume.split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in loaded["volumes"], volume
        for config in each.get("configs", ()):
            assert config["source"] in loaded["configs"]
        if "build" in each:
            context = DOCKER / each["build"]["context"]
            assert (context / each["build"]["dockerfile"]).samefile(DOCKER / "Dockerfile")
    assert services["node-1"]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    assert services["migrate"]["depends_on"]["postgres"] == {"condition": "service_healthy"}
    assert services["pgbouncer"]["profiles"] == ["pgbouncer"]
    assert [each for each in services.values() if each.get("ports")] == [services["nginx"]]
    names = [services[f"node-{number}"]["environment"]["PGMCP_NODE_NAME"] for number in (1, 2, 3)]
    assert names == ["node-1", "node-2", "node-3"]


def test_compose_serves_the_example_and_what_it_is_told_to() -> None:
    for env in ({}, {"SERVER": "../examples/everything.py"}):
        node = compose(**env)["services"]["node-1"]
        file, _, attribute = in_checkout(node, node["command"][1]).rpartition(":")
        assert re.search(rf"^{attribute} = ", Path(file).read_text(), re.MULTILINE)


def test_docker_accepts_the_compose_file() -> None:
    if shutil.which("docker") and not _run("docker", "compose", "version").returncode:
        done = _run("docker", "compose", "--file", str(DOCKER / "compose.yaml"), "--profile", "*", "config", "--quiet")
        assert done.returncode == 0, done.stderr
    # Without the plugin the tests above are all there is.


# -- Kubernetes ------------------------------------------------------------------------------------------------------


def test_the_manifests_fit_together() -> None:
    found = manifests()
    assert set(found) == {"Deployment", "Service", "PodDisruptionBudget"}
    deployment = found["Deployment"]["spec"]
    [spread] = pod()["topologySpreadConstraints"]
    for selector in (
        deployment["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        spread["labelSelector"]["matchLabels"],
    ):
        assert selector == deployment["template"]["metadata"]["labels"], "of these nodes, and of no stranger's pods"
        assert selector["app.kubernetes.io/name"] == "pgmcp"
    node, migrate = containers()
    [port] = node["ports"]
    assert port == {"name": "http", "containerPort": Settings().port}
    assert {each["targetPort"] for each in found["Service"]["spec"]["ports"]} == {"http"}
    for container in containers():
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert [each["mountPath"] for each in container["volumeMounts"]] == ["/tmp"], "the image's own server is served"
        assert container["envFrom"] == [{"configMapRef": {"name": "pgmcp-settings"}}], "one schema for both"
    assert migrate["args"] == ["db", "upgrade", "--contract-later"]
    # A service called pgmcp would bring PGMCP_PORT=tcp://… into every pod.
    assert not pod()["enableServiceLinks"]
    assert "cpu" not in node["resources"]["limits"]


def test_nodes_do_not_have_the_password_of_the_schemas_owner() -> None:
    def secret(container: Mapping[str, Any]) -> str:
        [name] = [one["valueFrom"]["secretKeyRef"]["name"] for one in container["env"] if one["name"].endswith("_URL")]
        return str(name)

    node, migrate = (secret(each) for each in containers())
    assert {node, migrate} == {"pgmcp-runtime", "pgmcp-owner"}
    text = (REPOSITORY / "docs" / "deployment.md").read_text()
    assert set(re.findall(r"create secret generic (\S+)", text)) == {node, migrate}


def test_kustomize_builds_them() -> None:
    for folder in (BASE, SAMPLE):
        for name in kustomization(folder)["resources"]:
            assert (folder / name).exists()
        assert {"PGMCP_ALLOWED_HOSTS", "PGMCP_ALLOWED_ORIGINS", "PGMCP_FORWARDED_ALLOW_IPS"} <= set(in_settings(folder))
    if shutil.which("kubectl"):
        done = _run("kubectl", "kustomize", str(SAMPLE))
        assert done.returncode == 0, done.stderr
        built = {one["kind"]: one for one in yaml.safe_load_all(done.stdout)}
        assert set(built) == {*manifests(), "ConfigMap"}
        selector = built["Service"]["spec"]["selector"]
        assert selector["app.kubernetes.io/instance"] == "calculator"
        assert selector == built["Deployment"]["spec"]["selector"]["matchLabels"]
        [settings] = [
            one["configMapRef"]["name"]
            for one in built["Deployment"]["spec"]["template"]["spec"]["containers"][0]["envFrom"]
        ]
        assert settings == built["ConfigMap"]["metadata"]["name"]
        assert built["ConfigMap"]["data"]["PGMCP_ALLOWED_HOSTS"] == "calculator.example.com"


# -- systemd ---------------------------------------------------------------------------------------------------------


def test_the_unit_is_one(tmp_path: Path) -> None:
    assert set(unit()) == {"Unit", "Service", "Install"}
    assert service()["Restart"] == "always"
    assert service()["RestartPreventExitStatus"] == "2", "a setting that cannot work; all else may mend itself"
    assert not {"SuccessExitStatus", "RestartForceExitStatus"} & set(service())
    assert dict(unit()["Unit"])["StartLimitIntervalSec"] == "0", "however often: an outage may be long"
    assert service()["KillMode"] == "mixed"
    if shutil.which("systemd-analyze"):
        here = Path(sys.executable).parent
        text = (DOCKER / "systemd" / "pgmcp@.service").read_text().replace("/opt/pgmcp/bin", str(here))
        file = tmp_path / "pgmcp@node-1.service"
        file.write_text(text)
        done = _run("systemd-analyze", "verify", "--man=no", str(file))
        assert (done.returncode, done.stderr) == (0, "")


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, check=False, text=True, timeout=60)
