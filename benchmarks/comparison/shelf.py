"""Put the policy of a finished run on the shelf, from where ``load_policy("NAME")`` takes it.

python benchmarks/comparison/shelf.py simple_spread runs/FOLDER   # a folder that examples/simple_tag.py wrote
python benchmarks/comparison/shelf.py                             # writes the table in docs/policies.md again
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from methods import ROOT
from report import insert
from tables import markdown

from matwm_rl.evaluation import evaluate
from matwm_rl.files import write_text
from matwm_rl.training import load_policy, save_policy
from matwm_rl.training.model_files import SHELF

PAGE, MARKER = ROOT / "docs" / "policies.md", "shelf"


def put(name: str, run_dir: Path, shelf: Path = SHELF) -> Path:
    """Copy the policy of a run, and return its new place.

    Raises:
        ValueError: if its card does not say where it was trained and how well it plays.
    """
    policy = load_policy(run_dir / "policy.pt")
    if policy.card is None or not policy.card.returns:
        raise ValueError(f"{run_dir / 'policy.pt'} has no card with returns: train it with examples/simple_tag.py")
    evaluate(policy.make_env(seed=0), policy, episodes=1)  # it can play
    path = shelf / f"{name}.pt"
    save_policy(path, policy)
    return path


def table(shelf: Path = SHELF) -> str:
    """Return the cards of all policies on the shelf, as a table in Markdown."""
    rows = []
    for path in sorted(shelf.glob("*.pt")):
        card = load_policy(path).card
        assert card is not None, f"{path} has no card"
        returns = "; ".join(f"{match.replace('_', ' ')} {value:.1f}" for match, value in card.returns.items())
        cells = [f"`{path.stem}`", f"`{card.env}`", f"{card.env_steps:,}", returns]
        cells += [f"{path.stat().st_size / 1e6:.1f} MB", f"`{card.command}`"]
        rows.append(cells)
    return markdown(["name", "environment", "env steps", "mean returns", "file", "trained by"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Copy, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="that load_policy is to know")
    parser.add_argument("run_dir", nargs="?", type=Path, help="folder of the finished run")
    options = parser.parse_args(arguments)
    if (options.name is None) != (options.run_dir is None):
        parser.error("give a name and the folder of a run, or neither")
    if options.name is not None:
        print(f"wrote {put(options.name, options.run_dir)}")
    write_text(PAGE, insert(PAGE.read_text(encoding="utf-8"), table(), MARKER))


if __name__ == "__main__":
    main()
