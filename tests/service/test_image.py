"""The Dockerfile and the compose file, held to what they name: nothing here builds or runs a container."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from typing import Any

import pytest
import yaml

from tests.test_readme import ROOT
from ultrarag.service.command import read_settings

FOLDER = ROOT / "resources" / "service"
DOCKERFILE = (FOLDER / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
STEPS = [line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
SERVING = ("service-1", "service-2")
TOKEN = "a-token-of-twenty-four-chars"


def of(step: str) -> list[str]:
    return [words for name, words in STEPS if name == step]


def test_what_is_copied_is_there_and_enters_the_build_context():
    copied = [name for words in of("COPY") for name in words.split()[:-1]]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[0] == "!"]
    assert sorted(kept) == sorted(copied)


def test_what_the_package_is_made_of_is_copied():
    """setup.cfg names files that must be there when it is installed, and extras."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    copied = {name for words in of("COPY") for name in words.split()[:-1]}
    named = {value.removeprefix("file:").strip() for value in config["metadata"].values() if value.startswith("file:")}
    assert named <= copied
    extras = re.search(r"'\.\[([\w,]+)\]'", DOCKERFILE)
    assert extras is not None
    assert set(extras.group(1).split(",")) <= set(config["options.extras_require"])
    found = re.search(r"grep '(.*?)' constraints.txt", DOCKERFILE)
    assert found is not None
    assert len(re.findall(found.group(1), (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)) == 1


def test_the_container_s_user_is_none_that_may_do_everything_and_its_command_is_one_of_ours(monkeypatch):
    assert of("USER") == ["ultrarag"]
    assert re.search(r"useradd .*--uid \d+ ultrarag", DOCKERFILE)
    assert json.loads(of("ENTRYPOINT")[0]) == ["ultrarag"]
    monkeypatch.setenv("ULTRARAG_TOKEN", TOKEN)
    settings = read_settings(json.loads(of("CMD")[0])[1:])
    assert (settings.path, settings.host) == ("/data/kb", "0.0.0.0")
    assert settings.path.startswith(f"{of('VOLUME')[0]}/")
    assert of("EXPOSE") == [str(settings.port)]


def test_pinned_images_and_declared_names():
    declared = {kind: set(COMPOSE.get(kind, ())) for kind in ("services", "volumes", "secrets", "configs")}
    for service in COMPOSE["services"].values():
        image = service["image"]
        assert image == "ultrarag" or re.fullmatch(r"[\w/.-]+:[\w.-]*\d[\w.-]*", image), image
        assert set(service.get("depends_on", ())) <= declared["services"]
        assert set(service.get("secrets", ())) <= declared["secrets"]
        assert {item["source"] for item in service.get("configs", ())} <= declared["configs"]
        volumes = {volume.split(":")[0] for volume in service.get("volumes", ())}
        assert {name for name in volumes if re.match(r"\w", name)} <= declared["volumes"]
    assert (FOLDER / COMPOSE["x-ultrarag"]["build"]["context"]).resolve() == ROOT
    assert all(port.startswith("127.0.0.1:") for port in COMPOSE["services"]["balancer"]["ports"])


def test_a_form_s_page_is_named_to_the_service_as_its_browser_names_it():
    """The guard compares Origin, which has the port, with Host: nginx's $host has none."""
    config = COMPOSE["configs"]["nginx"]["content"]
    assert "proxy_set_header Host $$http_host;" in config
    aliases = {alias for one in SERVING for alias in COMPOSE["services"][one]["networks"]["default"]["aliases"]}
    assert re.findall(r"set \$\$service ([\w-]+):", config) == sorted(aliases)
    assert set(COMPOSE["services"]["balancer"]["depends_on"]) == set(SERVING)
    assert len({COMPOSE["services"][one]["environment"]["MIRROR"] for one in SERVING}) == 2


@pytest.mark.parametrize("name", ["create", *SERVING])
def test_the_commands_of_the_compose_file_are_ours(name, tmp_path, monkeypatch, capsys):
    (line,) = COMPOSE["services"][name]["command"]
    words = shlex.split(line.replace("$$MIRROR", "1"))
    words = words[words.index("ultrarag") + 1 :]
    if name in SERVING:
        token = tmp_path / "token"
        token.write_text(TOKEN)
        settings = read_settings([str(token) if word == "/run/secrets/token" else word for word in words[1:]])
        assert (settings.path, settings.host, settings.uri) == ("/data/1", "0.0.0.0", "qdrant://qdrant:6333/kb")
        return
    from ultrarag.retrieve.command import main

    assert words[0] == "index"
    monkeypatch.chdir(tmp_path)
    assert main([*words[1:], "--no_such_flag"]) == 2
    said = capsys.readouterr().err
    assert "no_such_flag" in said  # and of no other word
    assert not any(word in said.splitlines()[-1] for word in words[1:] if word.startswith("--"))
