"""The world model alone, from stored data: no agents learn, and after collecting there is no environment."""

from dataclasses import replace
from pathlib import Path

import torch
from mpe2 import simple_tag_v3
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs.libs.pettingzoo import PettingZooWrapper

import matwm_rl as mw
from matwm_rl.data import load_dataset, save_dataset
from matwm_rl.envs import AgentLayout, merge_rollout
from matwm_rl.evaluation import episode_windows, open_loop_errors
from matwm_rl.training import load_world_model, save_world_model


def main(steps: int = 4_000, updates: int = 500, folder: Path = Path("runs/offline_world_model")) -> None:
    torch.manual_seed(0)
    # Random agents fill TorchRL's buffer from any grouped environment, one that knows nothing of this library.
    env = PettingZooWrapper(simple_tag_v3.parallel_env(max_cycles=25), use_mask=True, done_on_any=False)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(steps))
    for batch in Collector(env, None, frames_per_batch=steps // 10, total_frames=steps):
        buffer.extend(batch)
    folder.mkdir(parents=True, exist_ok=True)
    save_dataset(folder / "data.pt", buffer[:])

    # From here on only the file is used. It may be untrusted; `buffer.loads` would execute what a folder holds.
    stored = load_dataset(folder / "data.pt")
    layout = AgentLayout.from_rollout(stored, num_actions={"adversary": 5, "agent": 5})
    data = merge_rollout(stored, layout)
    train, test = data[: steps * 4 // 5], episode_windows(data[steps * 4 // 5 :], length=20)
    cfg = mw.presets.vectors()
    world_model = mw.WorldModel.from_env(layout, cfg.world_model)
    loss = mw.WorldModelLoss(world_model, weights=cfg.learner.loss_weights)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    replay = mw.make_replay(layout.num_agents, replace(cfg.replay, recency_decay=1.0))  # no data is older than other
    replay.extend(train)
    for _ in range(updates):
        losses = loss(replay.sequences.sample())
        optimizer.zero_grad()
        sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
        optimizer.step()
    save_world_model(folder / "world_model.pt", world_model)

    for name, model in (("trained", world_model.eval()), ("loaded", load_world_model(folder / "world_model.pt"))):
        torch.manual_seed(1)
        errors = open_loop_errors(model, test, context_length=5, horizon=15)
        error, kept = (errors[source, "observation"].mean(-1)[[0, 4, 14]].tolist() for source in ("model", "trivial"))
        print(f"{name} model, error 1, 5 and 15 steps ahead:", *(f"{value:.3f}" for value in error))
    print("last observation kept, error 1, 5 and 15 steps ahead:", *(f"{value:.3f}" for value in kept))


if __name__ == "__main__":
    main()
