from __future__ import annotations

import pytest

from tests.examples.helpers import numbers, run_example


def test_a_policy_of_torchrls_is_trained_in_dreams(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"rounds": ((200, 3, 2), (50, 2, 2)), "episodes": 2}
    random, trained = run_example("imagined_mappo", capsys, **sizes)
    assert random.startswith("random agents") and trained.startswith("agents trained in dreams")
    # Agents cannot be nearer to landmarks than at no distance, and are rewarded for nothing else.
    assert numbers(random)[0] < 0 and numbers(trained)[0] < 0
    assert numbers(random) != numbers(trained)
    assert run_example("imagined_mappo", capsys, **sizes) == [random, trained]
