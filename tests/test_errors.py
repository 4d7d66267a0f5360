"""The error tree crosses processes."""

from __future__ import annotations

import pickle

from tpray import errors


def test_every_error_crosses_processes() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    assert len(classes) >= 20
    for cls in classes:
        copy = pickle.loads(pickle.dumps(cls("what to do")))
        assert type(copy) is cls
        assert str(copy) == "what to do"
    item = pickle.loads(pickle.dumps(errors.EmptyInputError("is empty: send some text", 3)))
    assert (item.item, str(item)) == (3, "item 3 is empty: send some text")
    overloaded = pickle.loads(pickle.dumps(errors.OverloadedError("try again later", 7)))
    assert (overloaded.retry_after_s, str(overloaded)) == (7, "try again later")
    assert item.said_of("line 4") == "line 4 is empty: send some text"
