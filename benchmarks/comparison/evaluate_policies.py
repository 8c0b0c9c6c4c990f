"""Judge policies that are trained already, by the protocol of the comparison.

    python benchmarks/comparison/evaluate_policies.py simple_tag runs/0/policy.pt runs/1/policy.pt runs/2/policy.pt

Prints every figure of every policy, and the median over them. All policies play the same episodes as those of
sample_efficiency.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from protocol import ENVIRONMENTS, evaluate_policy
from world_model_quality import world_model_quality

from matwm_rl.files import write_text
from matwm_rl.training import load_policy, prepare_process

QUALITY_EPISODES = 100


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", choices=ENVIRONMENTS)
    parser.add_argument("policies", nargs="+", type=Path, help="files of save_policy")
    parser.add_argument("--world-model", action="store_true", help="also measure the world models, policy i by seed i")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    options = parser.parse_args(argv)
    prepare_process(num_threads=1, matmul_precision="highest")
    environment = ENVIRONMENTS[options.environment]
    layout = environment.make().layout
    figures: dict[str, dict[str, float]] = {}
    for seed, path in enumerate(options.policies):
        policy = load_policy(path, layout=layout)
        figures[str(path)] = evaluate_policy(environment, policy)
        if options.world_model:
            asked = {"episodes": QUALITY_EPISODES, "seed": seed + 1_000, **environment.env_kwargs}
            figures[str(path)] |= world_model_quality(policy, environment.env, **asked)
        print(f"{seed}: {path}", flush=True)
    print(f"{'':40s}" + "".join(f"{seed:>9}" for seed in range(len(figures))) + "   median")
    for metric in next(iter(figures.values())):
        values = [found[metric] for found in figures.values()]
        print(f"{metric:40s}" + "".join(f"{value:9.2f}" for value in [*values, median(values)]))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.output, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
