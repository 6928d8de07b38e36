"""The job files in docs/: shell that parses, Kubernetes objects that name each other, commands that the engine knows."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tyro
import yaml

from bdengine.configs import EvaluateConfig, SampleConfig
from bdengine.train import TrainConfig

PAGE = (Path(__file__).parent.parent / "docs" / "many-machines.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.M | re.S)


def test_the_shell_parses() -> None:
    assert len(blocks("bash")) == 2
    for text in blocks("bash"):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_the_objects_of_kubernetes_name_each_other() -> None:
    (text,) = blocks("yaml")
    service, job = yaml.safe_load_all(text)
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    words = shlex.split(container["args"][0])
    assert words[words.index("--nnodes") + 1] == str(spec["completions"]) == str(spec["parallelism"])
    assert words[words.index("--master-addr") + 1] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert int(words[words.index("--nproc-per-node") + 1]) == container["resources"]["limits"]["nvidia.com/gpu"]
    subprocess.run(["bash", "-n"], input=container["args"][0], text=True, check=True)
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize(
    ("command", "config", "count"),
    [("sample", SampleConfig, 3), ("evaluate", EvaluateConfig, 1), ("train", TrainConfig, 2)],
)
def test_the_engine_knows_the_commands(command: str, config: type, count: int) -> None:
    text = PAGE.replace("\\\n", " ")
    said = re.findall(rf"-m bdengine {command} ([^\n'`]*)", text)
    assert len(said) == count
    for words in said:
        parsed = tyro.cli(config, args=shlex.split(words))
        assert parsed.out.parts[:2] == ("/", "shared")
        if isinstance(parsed, TrainConfig):
            parsed.check(ranks=32 if parsed.init else 8)
