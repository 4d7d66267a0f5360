"""What requests call the model: ``--served-model-name``.

Sources: vLLM (entrypoints/openai/models/serving.py): answers carry the first name, whichever of them was asked for, and
a request that says no name, or an empty one, is for the model that there is. Infinity (fastapi_schemas/pymodels.py) has
a name for that.
"""

from __future__ import annotations

from typing import NamedTuple

from tpray.errors import UnknownModelError

NO_NAMES = (None, "", "default/not-specified")
"""What says no name: the last is what Infinity's client sends where its user names no model."""


class ModelNames(NamedTuple):
    """The names of one server's model. served: those that the operator gave it; none: any name is taken.

    source: what the checkpoint is called.
    """

    served: tuple[str, ...]
    source: str

    @property
    def listed(self) -> tuple[str, ...]:
        """Those that clients are told of, at least one; answers carry the first."""
        return self.served or (self.source,)

    def check(self, asked: str | None) -> None:
        """Refuse a request for another model; for every dialect whose requests name one.

        Raises:
            UnknownModelError: ``asked`` is none of `served`.
        """
        if self.served and asked not in (*NO_NAMES, *self.served):
            raise UnknownModelError(
                f"the model `{asked}` does not exist here: ask for {' or '.join(f'`{name}`' for name in self.served)}"
            )
