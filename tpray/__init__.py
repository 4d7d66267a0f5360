"""tpray: tensor-parallel transformer classifiers on Ray.

``tpray.load(MODEL, tp=2)`` gives a group to use from Python; ``tpray serve`` puts one behind HTTP, and
``tpray.connect()`` gives a handle of it.

Words, each for one thing:

==============  ======================================================================================================
rank            one of the N that share a model, numbered from 0; also its number
shard           the part of the model that one rank holds
worker          the object that is a rank: it traces, loads and runs its shard (`group.worker`)
group           the running thing: N ranks that work as one (`group.group`)
executor        what starts a group's ranks and calls them (`group.executor`): Ray actors, threads, or fakes
topology        how a group lies on its node: degree, runtime, cores, processes (`platforms.topology`)
placement       the resources that Ray reserves for a group (`group.placement`)
platform        what a kind of core needs before a process starts (`platforms`)
runtime         how a rank traces, loads and runs on that kind of core (`runtime`)
program         what `torch.export` made of a shard, loaded and ready to run
bucket          a static shape, rows x tokens, that a program was traced for
artifact        a traced model on disk, one program per rank, with a manifest that vouches for it (`artifacts`)
plan            which layer of an architecture is split, and how (`parallel_layers.plan`)
collective      how ranks combine tensors within a step (`parallel_layers.collective`)
user model      a user's own model with parallel layers, traced by `tpray.trace`
structure       the tuples, lists and dicts that hold a user model's inputs or outputs (`runtime.structure`)
step            one run of the program on all ranks
row             one tokenised text or pair; packed rows lie end to end, so that no padding is computed
item            a text, a pair, a conversation or token ids, as a client sends it
codec           items to rows (`serving.codec`)
engine          codec, queue and group together (`serving.engine`)
replica         a Serve replica: one engine with its group
dialect         the HTTP routes and bodies of some other server that clients know (`serving.dialects`)
key             what a client shows who asks; it has a name and perhaps limits (`serving.keys`)
gate            where requests are counted, and turned away once a server stops (`serving.gate`)
canary          a fixed input whose unsharded logits are known, compared before a group serves
state           of a group: new, starting, ready, failed, stopped (`group.lifecycle`)
==============  ======================================================================================================
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tpray.version import __version__

__all__ = ["__version__", "connect", "data", "errors", "load", "parallel_layers", "trace"]

if TYPE_CHECKING:
    from tpray import data, errors, parallel_layers, trace
    from tpray.serving.client import connect
    from tpray.serving.local import load

_MODULES = ("data", "errors", "modules", "parallel_layers", "trace")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})


def __getattr__(name: str) -> Any:
    if name == "load":  # brings torch and Ray, which `tpray --help` need not wait for
        from tpray.serving.local import load

        return load
    if name == "connect":
        from tpray.serving.client import connect

        return connect
    if name in _MODULES:  # as attributes of the package, which a script from neuronx-distributed takes them for
        return import_module(f"tpray.{name}")
    raise AttributeError(f"module 'tpray' has no attribute {name!r}")
