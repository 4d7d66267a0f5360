"""What vLLM's requests may all say, by vLLM's names.

Source: vLLM (entrypoints/pooling/base/protocol.py, `PoolingBasicRequestMixin` and `ClassifyRequestMixin`;
renderers/params.py, `TokenizeParams`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from tpray.errors import InputError
from tpray.serving.codec import Direction
from tpray.serving.scores import OWN, RAW, Scoring


class Options(BaseModel):
    """Fields that all of vLLM's requests for scores have. Each may be null."""

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, description="one that is served; null: the one that there is")
    user: str | None = Field(None, description="for your own records: it changes nothing")
    truncate_prompt_tokens: Annotated[StrictInt, Field(ge=-1)] | None = Field(
        None, description="cut texts to so many tokens; -1: to what the model takes; null: too long ones are refused"
    )
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="which end is cut where truncate_prompt_tokens says so; null: right, so that the first stay"
    )
    use_activation: StrictBool | None = Field(None, description="false: logits; null or true: what is made of them")
    activation: StrictBool | None = Field(None, description="the older name of use_activation")
    request_id: str | None = Field(None, max_length=256, description="the end of the answer's id; null: a random one")
    priority: Literal[0] | None = Field(None, description="only 0: there are no priorities here")

    def scoring(self) -> Scoring:
        """What is made of the logits.

        Raises:
            InputError: two fields say otherwise of it.
        """
        if None not in (self.use_activation, self.activation) and self.use_activation != self.activation:
            raise InputError("`activation` is the older name of `use_activation`, and they differ: give one of them")
        return RAW if False in (self.use_activation, self.activation) else OWN

    def most_tokens(self, max_length: int) -> int:
        """How many tokens a text is cut to, where it is; at most ``max_length``, what the model takes.

        Raises:
            InputError: it is none, or more.
        """
        most = self.truncate_prompt_tokens
        if most is None or most == -1:
            return max_length
        if not 0 < most <= max_length:
            raise InputError(
                f"`truncate_prompt_tokens` is {str(most)[:24]}, and this model takes 1 to {max_length}: send one of "
                "these, or -1 for as many as it takes"
            )
        return most

    @property
    def direction(self) -> Direction:
        """The end that is cut."""
        return "Left" if self.truncation_side == "left" else "Right"
