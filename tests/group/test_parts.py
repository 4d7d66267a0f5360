"""Steps in parts, on real ranks: other steps run between the parts, and every answer is what it would be alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import pad_id_of, rows
from tpray.config import ModelConfig
from tpray.errors import ArtifactError, NotReadyError, RankError, StepError
from tpray.group.classifier import ClassifierGroup
from tpray.group.jobs import Loaded
from tpray.group.lifecycle import State
from tpray.group.thread_executor import ThreadExecutor

Work = Callable[[ClassifierGroup], Awaitable[None]]


def with_group(checkpoint: Path, tp: int, work: Work) -> None:
    async def run() -> None:
        group = ClassifierGroup(ModelConfig(source=str(checkpoint)), ThreadExecutor(tp))
        await group.start()
        try:
            await asyncio.wait_for(work(group), 60)
        finally:
            await group.stop()

    asyncio.run(run())


@pytest.mark.parametrize(("model_type", "tp"), [("bert", 1), ("bert", 2), ("bert", 3), ("gpt2", 2)])
def test_steps_between_the_parts_of_another_disturb_neither(
    model_type: str, tp: int, make_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = make_checkpoint(model_type)
    long, *short = (rows(lengths, pad_id_of(checkpoint)) for lengths in ([40], [3], [5, 2], [7], [4, 4, 9]))

    async def work(group: ClassifierGroup) -> None:
        assert group.parts > 1
        alone = [(await group.step(batch)).logits for batch in (long, *short)]
        for _ in range(5):
            running = [group.step_in_parts(long), *(group.step(batch) for batch in short), group.step_in_parts(long)]
            *together, again = [result.logits for result in await asyncio.gather(*running)]
            for found, expected in zip([*together, again], [*alone, alone[0]], strict=True):
                assert np.array_equal(found, expected)

    with_group(checkpoint, tp, work)


def test_a_step_whose_parts_raise_alike_is_its_own_error_and_the_next_goes_on(
    make_checkpoint: Callable[..., Path],
) -> None:
    checkpoint = make_checkpoint("bert")
    good = rows([40], pad_id_of(checkpoint))
    bad = [array.copy() for array in good]
    bad[0][0, 3] = 1 << 40

    async def work(group: ClassifierGroup) -> None:
        wanted = (await group.step(good)).logits
        for _ in range(2):
            with pytest.raises(StepError, match="IndexError"):
                await group.step_in_parts(bad)
            assert np.array_equal((await group.step_in_parts(good)).logits, wanted)
        assert group.lifecycle.restarts == 0

    with_group(checkpoint, 2, work)


def test_a_group_that_restarts_between_parts_forgets_the_step_and_says_so(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint("bert")
    batch = rows([40], pad_id_of(checkpoint))

    async def work(group: ClassifierGroup) -> None:
        wanted = (await group.step(batch)).logits
        step, sent = group.step, []

        async def restart_behind_the_second(*arguments: object) -> object:
            result = await step(*arguments)  # type: ignore[arg-type]
            sent.append(result)
            if len(sent) == 2:
                group.channel.on_failure(RankError("rank 1 died"))
                while group.lifecycle.state is not State.READY:
                    await asyncio.sleep(0.01)
            return result

        monkeypatch.setattr(group, "step", restart_behind_the_second)
        restarts = group.lifecycle.restarts
        with pytest.raises(NotReadyError, match="has restarted"):
            await group.step_in_parts(batch)
        assert group.lifecycle.restarts == restarts + 1
        assert np.array_equal((await group.step_in_parts(batch)).logits, wanted)

    with_group(checkpoint, 2, work)


def test_ranks_whose_programs_differ_are_refused() -> None:
    assert Loaded.of_all([Loaded(True, 8), Loaded(True, 8)]) == Loaded(True, 8)
    with pytest.raises(ArtifactError, match="trace it again"):
        Loaded.of_all([Loaded(True, 8), Loaded(True, 7)])
