"""An environment of your own, with a name for the command line, a rule of its ends, a renderer and an evaluation.

python examples/simple_tag.py imports=[examples.extending.environment] env=mine/meeting
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDictBase

from examples.extending.meeting import Meeting
from matwm_rl import envs, evaluation


def end(env: Meeting, tensordict: TensorDictBase, alive: torch.Tensor) -> envs.Ends:  # which are time limits?
    done, met = tensordict["done"], env.met
    return envs.Ends(alive=alive, done=done, terminated=done & met, truncated=done & ~met)


def draw(env: Meeting, index: int) -> np.ndarray:
    picture = np.full((65, 65, 3), 255, np.uint8)
    for (x, y), colour in zip((30 * (env.place[index] + 1)).int().tolist(), ((200, 0, 0), (0, 0, 200)), strict=True):
        picture[y : y + 5, x : x + 5] = colour
    return picture


def play(env, policy, **how) -> evaluation.Matches:  # together, and: does the walker find a dog that runs about?
    alone = evaluation.CrossPlay(policy, evaluation.RandomActions(), env.layout, ["walker"])
    sides = {"together": policy, "random_dog": alone}
    returns = {name: evaluation.evaluate(env, side, **how) for name, side in sides.items()}
    return evaluation.Matches(returns, judged=dict.fromkeys(sides, "walker"))


envs.register_family("mine", lambda task, *, num_envs, device: Meeting(num_envs), vectorized=True)
envs.register_end_rule(Meeting, end, agents_die=False)
envs.register_renderer(Meeting, draw)
evaluation.register_evaluation("mine/meeting", evaluation.Evaluation(play))


def main(run_dir: Path = Path("runs/meeting"), overrides: tuple[str, ...] = ("total_steps=2500",)) -> None:
    _, script, *settings = __doc__.splitlines()[2].split()
    subprocess.run([sys.executable, script, *settings, f"run_dir={run_dir}", *overrides], check=True)
    trained = json.loads((run_dir / "summary.json").read_text())["evaluation"]
    env = envs.make_env("mine/meeting", num_envs=10, seed=0)
    random = evaluation.evaluate_matches("mine/meeting", env, evaluation.RandomActions(), episodes=100).summary()
    for name, returns in {"random agents": random, "trained agents": trained}.items():
        print(f"{name}, mean return of the walker:", *(f"{match} {value:.1f}" for match, value in returns.items()))


if __name__ == "__main__":
    main()
