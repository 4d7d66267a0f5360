"""The files for clusters: read by Ray's own code, and checked for what Ray does not check. No cloud, no Kubernetes."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tpray.config import ServeConfig
from tpray.group.nodes import matches
from tpray.serving.access import on_loopback
from tpray.serving.keys import parse

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster.yaml"
RAYSERVICE = ROOT / "deployments" / "kuberay-rayservice.yaml"
FAMILIES = ("inf2", "trn1", "trn2")
FLAGS = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    "RAY_USAGE_STATS_ENABLED": "0",
}
CORES = "NEURON_RT_VISIBLE_CORES"
# vCPUs and MiB as EC2's DescribeInstanceTypes gives them.
EC2 = {"m6i.xlarge": (4, 16_384), "inf2.24xlarge": (96, 393_216), "trn1.32xlarge": (128, 524_288)}


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def serve_config(family: str) -> ServeConfig:
    args = read(ROOT / "deployments" / f"{family}.yaml")["applications"][0]["args"]
    return ServeConfig.model_validate(args)


def bundle(config: ServeConfig) -> dict[str, int]:
    """What one group takes of its node: each rank's NeuronCores, and a CPU for its process."""
    tp, width = config.parallel.tp, config.parallel.cores_per_rank
    assert width is not None
    assert tp != "auto", "the machine that reads the file is not the one that serves"
    return {"CPU": tp, "neuron_cores": tp * width}


def holds(node: dict[str, int], needs: dict[str, int]) -> bool:
    return all(node.get(name, 0) >= amount for name, amount in needs.items())


def exports(command: str) -> dict[str, str]:
    """The variables that a shell command exports before its ``ray start``."""
    steps = [shlex.split(step) for step in command.split("&&")]
    start = next(i for i, words in enumerate(steps) if words[:2] == ["ray", "start"])
    found = [word for words in steps[:start] if words[0] == "export" for word in words[1:]]
    return dict(word.split("=", 1) for word in found)


def prepared() -> dict[str, Any]:
    """cluster.yaml with Ray's defaults, as `ray up` has it before it asks AWS."""
    from ray.autoscaler._private.util import prepare_config

    found: dict[str, Any] = prepare_config(read(CLUSTER))
    return found


# The deployments.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deployment_names_its_family_and_a_degree_it_has(family: str) -> None:
    parallel = serve_config(family).parallel
    degrees = {"inf2": {1, 2, 4, 8, 24}, "trn1": {1, 2, 8, 16, 32}, "trn2": {1, 2, 4, 8, 16, 32, 64}}[family]
    assert parallel.instance_family == family
    assert parallel.runtime == ("neuron" if family == "trn2" else "neuron-xla")
    assert parallel.tp in degrees
    assert parallel.lnc == (2 if family == "trn2" else None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deployment_fits_the_demo_that_it_serves(family: str) -> None:
    from transformers import AutoConfig

    from tpray.config import DEMO_DIR

    config, demo = serve_config(family), AutoConfig.from_pretrained(DEMO_DIR)
    assert config.model.source is None
    assert config.parallel.tp <= demo.num_attention_heads
    assert config.model.buckets
    assert all(length <= demo.max_position_embeddings for _, length in config.model.buckets)


@pytest.mark.parametrize("family", ["inf2", "trn1"])
def test_what_a_deployment_has_in_comments_for_mixed_clusters_is_valid(family: str) -> None:
    text = (ROOT / "deployments" / f"{family}.yaml").read_text()
    for setting in ("node_labels", "access"):
        text = text.replace(f"      # {setting}:", f"      {setting}:")
    config = ServeConfig.model_validate(yaml.safe_load(text)["applications"][0]["args"])
    selector = config.node_labels
    assert str(config.access.keys_file) in read(CLUSTER)["file_mounts"], "what a cluster needs besides the host"
    assert serve_config(family).node_labels == {}
    types = read(CLUSTER)["available_node_types"]
    assert selector
    assert [name for name, found in types.items() if matches(found.get("labels", {}), selector)] == [family]


# cluster.yaml


def test_ray_accepts_the_cluster_file() -> None:
    from ray.autoscaler._private.util import validate_config

    config = prepared()
    validate_config(config)
    types = config["available_node_types"]
    assert config["head_node_type"] == "head"
    assert (types["head"]["min_workers"], types["head"]["max_workers"]) == (0, 0)
    assert types["head"]["resources"] == {"CPU": 0}, "neither work nor NeuronCores on the head"
    for family in ("inf2", "trn1"):
        assert types[family]["min_workers"] == 0
        assert 0 < types[family]["max_workers"] <= config["max_workers"]
    assert 0 < config["idle_timeout_minutes"] <= 60


def test_ray_refuses_the_cluster_file_with_a_mistake() -> None:
    """The check above would mean nothing if Ray's schema took anything."""
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import validate_config

    config = prepared()
    config["available_node_types"]["inf2"]["resources"]["neuron_cores"] = "12"
    with pytest.raises(ValidationError):
        validate_config(config)


def launches(needs: Mapping[str, float], family: str | None = None) -> dict[str, int]:
    """What Ray's autoscaler (version 2) starts for one STRICT_PACK group, on a family's label or on any."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import GangResourceRequest
    from ray.core.generated.common_pb2 import LabelSelectorOperator

    selectors = [[("instance-family", LabelSelectorOperator.LABEL_OPERATOR_IN, [family])]] if family else None
    group = GangResourceRequest(requests=[ResourceRequestUtil.make(dict(needs), label_selectors=selectors)])
    config = AutoscalingConfig(read(CLUSTER), skip_content_hash=True)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        gang_resource_requests=[group],
    )
    reply = ResourceDemandScheduler().schedule(request)
    assert bool(reply.to_launch) != bool(reply.infeasible_gang_resource_requests)
    return {launch.instance_type: launch.count for launch in reply.to_launch}


@pytest.mark.parametrize("family", ["inf2", "trn1"])
def test_the_autoscaler_starts_one_worker_of_the_labelled_family(family: str) -> None:
    assert launches(bundle(serve_config(family)), family) == {family: 1}


def test_without_the_label_the_autoscaler_takes_the_family_that_fits_closest() -> None:
    """Why the deployments name the label for mixed clusters: nothing else sends a Trn1 group to Trn1."""
    assert launches(bundle(serve_config("trn1"))) == {"inf2": 1}


def test_a_group_larger_than_any_worker_starts_none() -> None:
    assert launches({"CPU": 32, "neuron_cores": 32}) == {"trn1": 1}
    assert launches({"CPU": 33, "neuron_cores": 33}) == {}
    assert launches({"CPU": 24, "neuron_cores": 24}, "inf2") == {}


@pytest.mark.parametrize("family", ["inf2", "trn1"])
def test_a_worker_has_the_cores_that_ray_knows_of_its_instance_type(family: str) -> None:
    from ray._private.accelerators.neuron import AWS_NEURON_INSTANCE_MAP

    worker = prepared()["available_node_types"][family]
    instance = worker["node_config"]["InstanceType"]
    assert instance.startswith(f"{family}.")
    assert worker["resources"] == {"CPU": EC2[instance][0], "neuron_cores": AWS_NEURON_INSTANCE_MAP[instance]}
    assert holds(worker["resources"], bundle(serve_config(family)))


def test_the_aws_provider_keeps_the_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.aws import node_provider
    from ray.autoscaler._private.util import validate_config

    described = [
        {"InstanceType": name, "VCpuInfo": {"DefaultVCpus": cpus}, "MemoryInfo": {"SizeInMiB": memory}}
        for name, (cpus, memory) in EC2.items()
    ]
    monkeypatch.setattr(node_provider, "list_ec2_instances", lambda *_: described)
    before = prepared()
    after = node_provider.AWSNodeProvider.fillout_available_node_types_resources(copy.deepcopy(before))
    validate_config(after)
    for name, node_type in before["available_node_types"].items():
        assert node_type["resources"].items() <= after["available_node_types"][name]["resources"].items()
    assert "neuron_cores" not in after["available_node_types"]["head"]["resources"]


def test_ray_prepares_an_account_for_the_cluster_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What `ray up` does before the first instance, by Ray's own code, in an account that moto keeps in memory."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws import config as aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("HOME", str(tmp_path))  # where the key goes
    (tmp_path / ".ssh").mkdir()
    monkeypatch.setattr("ray.autoscaler._private.aws.config.time.sleep", lambda _: None)
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        ready = aws.bootstrap_aws(prepared())
        groups = {
            g["GroupId"]: g for g in boto3.client("ec2", "us-west-2").describe_security_groups()["SecurityGroups"]
        }
    assert Path(ready["auth"]["ssh_private_key"]).is_file()
    types = ready["available_node_types"]
    assert "ray-autoscaler-v1" in ready["head_node"]["IamInstanceProfile"]["Arn"]
    for node_type in types.values():
        node = node_type["node_config"]
        assert node["SubnetIds"]
        assert node["KeyName"]
        assert node["ImageId"].startswith("resolve:ssm:")
        for opened in groups[node["SecurityGroupIds"][0]]["IpPermissions"]:
            anywhere = any(r["CidrIp"] == "0.0.0.0/0" for r in opened["IpRanges"])
            assert not anywhere or opened.get("FromPort") == opened.get("ToPort") == 22, "only SSH is open to everybody"


def start_commands() -> list[str]:
    config = prepared()
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


def test_the_commands_are_shell() -> None:
    config = prepared()
    for key in ("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for command in config[key]:
            subprocess.run(["bash", "-n", "-c", command], check=True)  # reads it and runs nothing


def test_setting_up_stops_with_a_sentence_on_an_image_without_the_environment(tmp_path: Path) -> None:
    check = next(command for command in prepared()["worker_setup_commands"] if "ImageId" in command)
    venv = "/opt/aws_neuronx_venv_pytorch_2_9"
    assert prepared()["worker_setup_commands"].index(check) == 1, "before anything is installed"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to("/bin/sh")
    for folder, code in ((tmp_path / "absent", 1), (tmp_path, 0)):
        done = subprocess.run(
            ["bash", "-c", check.replace(venv, str(folder))], capture_output=True, text=True, check=False
        )
        assert done.returncode == code
        assert len(done.stderr.splitlines()) == code
        assert (f"this image has no {folder}: set ImageId" in done.stderr) == bool(code)


def test_every_start_command_sets_serves_flags_and_the_token() -> None:
    commands = start_commands()
    assert len(commands) == 2, "one for the head, one for the workers"
    for command in commands:
        assert exports(command) == FLAGS | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": "$HOME/.ray/auth_token",
        }
    head, worker = commands
    assert "--head" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert "--address=$RAY_HEAD_IP:6379" in worker
    assert "--port=6379" in head


def test_the_token_reaches_every_node() -> None:
    from ray._private.authentication.authentication_token_setup import _get_default_token_path

    mounts = prepared()["file_mounts"]
    assert os.path.expanduser(mounts["~/.ray/auth_token"]) == str(_get_default_token_path())


def test_what_the_readme_makes_of_a_deployment_for_a_cluster_has_a_key() -> None:
    (command,) = re.findall(r"^sed .* deployments/inf2.yaml", (ROOT / "README.md").read_text(), re.MULTILINE)
    done = subprocess.run(shlex.split(command), cwd=ROOT, capture_output=True, text=True, check=True)
    config = yaml.safe_load(done.stdout)
    access = ServeConfig.model_validate(config["applications"][0]["args"]).access
    assert config["http_options"]["host"] == "0.0.0.0"
    assert str(access.keys_file) in read(CLUSTER)["file_mounts"]


def test_the_keys_reach_every_node_and_only_their_user_reads_them() -> None:
    config = prepared()
    assert os.path.expanduser(config["file_mounts"]["~/.tpray/keys"]) == os.path.expanduser("~/.tpray/keys")
    for commands in ("head_setup_commands", "worker_setup_commands"):
        (step,) = [step for step in config[commands] if step.startswith("chmod 600")]
        assert step.split()[2:] == ["~/.ray/auth_token", "~/.tpray/keys"]
    (made,) = re.findall(r"echo \"(me: \$\(openssl rand -hex 32\))\" > ~/.tpray/keys", CLUSTER.read_text())
    (key,) = parse([made.replace("$(openssl rand -hex 32)", "0f" * 32)], "keys")
    assert key.name == "me"


def test_what_is_mounted_is_enough_to_install_tpray() -> None:
    config = prepared()
    mounted = {
        there.removeprefix("~/tpray/"): here
        for there, here in config["file_mounts"].items()
        if there.startswith("~/tpray/")
    }
    project = (ROOT / "pyproject.toml").read_text()
    assert set(mounted) == {"tpray", "pyproject.toml", "README.md", "LICENSE"}
    assert all(there == here and (ROOT / here).exists() for there, here in mounted.items())
    assert 'readme = "README.md"' in project
    assert 'license-files = ["LICENSE"]' in project
    venv = "/opt/aws_neuronx_venv_pytorch_2_9/bin/activate"
    for commands in ("head_setup_commands", "worker_setup_commands"):
        assert any(f". {venv}" in step and "pip install" in step and "~/tpray" in step for step in config[commands])
    assert all(command.startswith(f". {venv} &&") for command in start_commands())


def test_all_nodes_have_the_neuron_image() -> None:
    images = {t["node_config"]["ImageId"] for t in prepared()["available_node_types"].values()}
    parameter = "/aws/service/neuron/dlami/pytorch-2.9/ubuntu-24.04/latest/image_id"
    assert images == {f"resolve:ssm:{parameter}"}
    assert "ssm:GetParameters" in CLUSTER.read_text(), "who launches needs that permission, and the file says so"


# The RayService.


def rayservice() -> dict[str, Any]:
    return read(RAYSERVICE)


def groups() -> list[dict[str, Any]]:
    cluster = rayservice()["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


def node_types() -> dict[str, Any]:
    """The RayService's groups as Ray's autoscaler in the head pod reads them, validated by it."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = {"metadata": {"name": "tpray", "namespace": "default"}, "spec": rayservice()["spec"]["rayClusterConfig"]}
    found: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    return found


def test_the_rayservice_autoscales_with_version_2_and_a_token() -> None:
    import ray

    found = rayservice()
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayService")
    cluster = found["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["authOptions"] == {"mode": "token"}
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_serve_config_in_the_rayservice_is_valid_and_fits_a_worker() -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load(rayservice()["spec"]["serveConfigV2"]))
    assert schema.http_options.host == "0.0.0.0", "pods reach each other, and the service them, by the pods' addresses"
    (application,) = schema.applications
    assert application.import_path == "tpray.serving.app:build"
    config = ServeConfig.model_validate(application.args)
    types = node_types()
    head = types.pop("headgroup")
    assert head["resources"]["CPU"] == 0
    assert "neuron_cores" not in head["resources"]
    for name, worker in types.items():
        assert name == config.parallel.instance_family
        assert holds(worker["resources"], bundle(config))
        assert worker["max_workers"] > 0


def test_a_worker_pods_cores_are_what_ray_is_told() -> None:
    _, *workers = groups()
    assert workers
    for group in workers:
        resources = container(group)["resources"]
        assert resources["limits"] == resources["requests"], "Kubernetes takes devices only with both the same"
        told = node_types()[group["groupName"]]["resources"]["neuron_cores"]
        assert resources["limits"]["aws.amazon.com/neuroncore"] == told


def test_every_pod_has_serves_flags_probes_and_the_ports_they_ask() -> None:
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS
    from ray.serve._private.haproxy import HAProxyConfig

    serve_port = yaml.safe_load(rayservice()["spec"]["serveConfigV2"])["http_options"]["port"]
    agent, proxy = (52365, "/api/healthz"), (serve_port, HAProxyConfig.health_check_endpoint)
    assert agent[1] in PUBLIC_EXACT_PATHS, "the kubelet has no token"
    for group in groups():
        pod = container(group)
        assert {entry["name"]: entry["value"] for entry in pod["env"] if "value" in entry} == FLAGS
        asked = {
            kind: (pod[kind]["httpGet"]["port"], pod[kind]["httpGet"]["path"])
            for kind in ("readinessProbe", "livenessProbe")
        }
        ready = proxy if "groupName" in group else agent  # only the head is there before Serve is
        assert asked == {"readinessProbe": ready, "livenessProbe": agent}
        assert serve_port in {port["containerPort"] for port in pod["ports"]}


def test_every_pod_has_the_key_that_pods_reached_by_others_need() -> None:
    """Of a secret, which the file says how to make; a replica without it refuses to start."""
    made = re.search(r"kubectl create secret generic (\S+) --from-literal=(\S+)=", RAYSERVICE.read_text())
    assert made is not None
    secret = {"secretKeyRef": {"name": made[1], "key": made[2]}}
    for group in groups():
        (entry,) = [entry for entry in container(group)["env"] if "valueFrom" in entry]
        assert entry == {"name": "TPRAY_API_KEY", "valueFrom": secret}
    config = yaml.safe_load(rayservice()["spec"]["serveConfigV2"])
    access = ServeConfig.model_validate(config["applications"][0]["args"]).access
    assert not on_loopback(config["http_options"]["host"])
    assert (access.insecure_no_key, access.open_routes) == (False, ("health", "page"))


# Both.


@pytest.mark.parametrize("path", [CLUSTER, RAYSERVICE], ids=lambda path: path.name)
def test_nothing_is_left_to_guess(path: Path) -> None:
    text = path.read_text()
    settings = [line.split(" #")[0] for line in text.splitlines() if not line.lstrip().startswith("#")]
    assert not any(CORES in line for line in settings), "Ray reads a range in it as one core, and sets it itself"
    assert not re.search(r"ami-[0-9a-f]{8,}|\bTODO\b|\bXXX\b|<[A-Za-z_-]+>", "\n".join(settings))
    lines = text.splitlines()
    placeholders = [i for i, line in enumerate(lines) if re.search(r"^\s*image: REGISTRY/", line)]
    assert len(placeholders) == (2 if path == RAYSERVICE else 0)
    for i in placeholders:
        assert "CHANGE" in "".join(lines[i - 2 : i + 1]), f"line {i + 1} does not say what to put there"
