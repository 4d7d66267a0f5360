"""How a new version of a deployment takes the old one's place.

Serve replaces replicas whose deployment has another version. Of a config file it takes a digest of all ``args`` for the
version of each deployment in it: another number of replicas, or one changed model of several, would replace all groups.
Here it is a digest of what the replicas themselves are made of.

The new groups start beside the old ones, and each old one stops once a new one answers (``max_surge_percent``). Where
none fits beside them, Serve waits, and the old ones go on answering; ``upgrade: stop-first`` has them stop first. A new
version whose replicas fail three times is given up, and the old ones that are left stay.

Source: ray/serve/_private/deployment_state.py and application_state.py of Ray 2.60.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import ray

from tpray.artifacts.memo import stamps
from tpray.config import ModelConfig, ServeConfig, local_directory
from tpray.group.nodes import has_room
from tpray.platforms.topology import Topology
from tpray.ray_private import builds_for_a_file, keep_version
from tpray.version import __version__

log = logging.getLogger(__name__)

NOT_OF_A_REPLICA = {"replicas", "autoscaling", "upgrade"}
"""What of a `ServeConfig` decides how many replicas there are and how they come, and not what each is."""

MEANWHILE = "with one group requests wait until the new one has started"


def version_of(config: ServeConfig) -> str:
    """The version of what a configuration makes of each replica."""
    return digest(config.model_dump(mode="json", exclude=NOT_OF_A_REPLICA), _files(config.model))


def digest(*made_of: Any) -> str:
    """The version of a deployment whose replicas are made of this, as JSON, and of the code that runs here."""
    environment = dict(ray.get_runtime_context().runtime_env) if ray.is_initialized() else {}
    return hashlib.sha256(json.dumps([__version__, environment, made_of], sort_keys=True).encode()).hexdigest()[:32]


def _files(model: ModelConfig) -> list[Any]:
    """What tells whether the files that a configuration names are still those: names, sizes and times, if here."""
    named = [path.expanduser() for path in (model.plan, model.chat_template) if isinstance(path, Path)]
    found = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in named if path.is_file()]
    directory = None if model.source is None else local_directory(model.source)
    return found + ([stamp[:3] for stamp in stamps(directory)] if directory is not None and directory.is_dir() else [])


def replaceable(deployment: Any, version: str) -> Any:
    """``deployment`` with a version of its own, where Serve builds it for a config file.

    Otherwise Serve's is kept, another each time: who calls `serve.run` again wants another try.
    """
    if builds_for_a_file():
        keep_version(deployment, version)
    return deployment


def say_what_comes(name: str, topology: Topology, config: ServeConfig) -> None:
    """Log what becomes of the groups that run, if this is a new version of them, where no further group fits."""
    if has_room(topology, config.node_labels):
        return
    if builds_for_a_file():
        serves: logging.Logger = logging.getLogger("ray.serve")  # nobody reads other logs of this process
        log.parent = serves
    needs = " and ".join(f"{amount:g} {resource}" for resource, amount in topology.resources().items())
    if config.upgrade == "stop-first":
        after = f"where this replaces a version, that stops first (upgrade: stop-first), and {MEANWHILE}"
    else:
        after = (
            "a new version waits for that, and the old one goes on answering: make room, or say `upgrade: stop-first`, "
            f"with which the old one stops first, and {MEANWHILE}"
        )
    log.warning("%s: no node has %s free for one more group; %s", name, needs, after)
