from __future__ import annotations

from typing import Any

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def unsaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are not rendered, which takes most of the time: the test looks at what was drawn into them."""

    def savefig(figure: Figure, path: Any, **options: Any) -> None:
        pass

    monkeypatch.setattr(Figure, "savefig", savefig)
