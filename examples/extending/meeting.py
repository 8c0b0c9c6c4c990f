"""An environment of TorchRL's kind, which knows nothing of this library; environment.py registers it."""

import torch
from tensordict import TensorDict
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

GROUPS = {"walker": ["walker_0"], "dog": ["dog_0"]}
MOVES = 0.1 * torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])


class Meeting(EnvBase):
    """A walker and a dog are paid by how much nearer they come to each other, and pay for their own steps.

    An episode is over when they meet, or after 25 steps. Like many environments, it reports both as the same "done".
    """

    def __init__(self, num_envs: int) -> None:
        super().__init__(batch_size=[num_envs])
        self.group_map = GROUPS
        agents = (num_envs, 1)  # one in each group
        specs = {"observation": Unbounded((*agents, 4)), "action": Categorical(5, shape=agents)}
        for name, spec in (specs | {"reward": Unbounded((*agents, 1))}).items():
            groups = {group: Composite({name: spec}, shape=agents) for group in GROUPS}
            setattr(self, f"{name}_spec", Composite(groups, shape=agents[:1]))
        self.place, self.time = torch.zeros(num_envs, 2, 2), torch.zeros(num_envs, 1)

    @property
    def distance(self) -> torch.Tensor:
        return self.place.diff(dim=1).norm(dim=-1)

    @property
    def met(self) -> torch.Tensor:
        return self.distance < 0.15

    def _set_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def _reset(self, tensordict: TensorDict | None, **kwargs) -> TensorDict:
        new = torch.tensor(True) if tensordict is None else tensordict.get("_reset", torch.tensor(True))
        self.place = torch.where(new.unsqueeze(-1), 2 * torch.rand_like(self.place) - 1, self.place)
        self.time = self.time.masked_fill(new, 0)
        return self._output()

    def _step(self, tensordict: TensorDict) -> TensorDict:
        action, before = torch.cat([tensordict[group, "action"] for group in GROUPS], -1), self.distance
        self.place, self.time = (self.place + MOVES[action]).clamp(-1, 1), self.time + 1
        reward = 10 * (before - self.distance) - 0.5 * (action > 0)
        return self._output(reward=reward.unsqueeze(-1)).set("done", self.met | (self.time >= 25))

    def _output(self, **entries: torch.Tensor) -> TensorDict:
        entries["observation"] = torch.cat([self.place, self.place.flip(1) - self.place], -1)
        agents = TensorDict(entries, self.place.shape[:2]).split(1, 1)
        return TensorDict(dict(zip(GROUPS, agents, strict=True)), self.batch_size)
