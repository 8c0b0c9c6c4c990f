"""One learner in several processes. Each has a part of every batch, and all have the same weights."""

from __future__ import annotations

import zlib
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrl.objectives import LossModule

from matwm_rl.arguments import check_kinds
from matwm_rl.processes import gather_from_processes, learning_together
from matwm_rl.training import guard
from matwm_rl.training.learner import Learner
from matwm_rl.training.learner_state import check_built

# In PyTorch 2.13, DistributedDataParallel hangs now and then when it is dropped with the last reference to its process
# group: its destructor holds the GIL and waits for a thread of the group that needs the GIL. So there is always another
# reference. A group that is not used any more costs an idle thread.
_groups: set[dist.ProcessGroup] = set()


def distribute(learner: Learner, group: dist.ProcessGroup | None = None) -> Learner:
    """Train one learner in several processes, as one process would train it with the batches of all of them.

    Call it in every process of the group, after ``torch.distributed.init_process_group``. All processes begin with
    the state of the first one, which is sent once. From then on each gives a part of every batch, of the same size, to
    ``update_world_model`` and ``update_agents``. PyTorch's ``DistributedDataParallel`` averages the gradients before
    they are clipped; losses, return scales and the norms of the world model count over all parts. So weights, moments
    of the optimizers, EMA critics and metrics are the same everywhere after every update.

    Each process needs random numbers of its own, ``torch.manual_seed(seed + rank)``, and its own data:
    :func:`matwm_rl.runs.split_run` gives its part of the settings. Save checkpoints in one of them.

    Args:
        learner: has the same networks and settings in every process.
        group: the processes; by default all.

    Returns:
        the same learner.

    Raises:
        RuntimeError: if the processes have not been connected.
        ValueError: if a process has another learner, or two of them draw the same random numbers.

    Examples:
        >>> import tempfile
        >>> from matwm_rl import presets
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import WorldModel, make_actor, make_critic
        >>> world_model = WorldModel.from_env(make_env("mock", seed=0), presets.tiny().world_model)
        >>> learner = Learner(world_model, make_actor(world_model), make_critic(world_model), presets.tiny().learner)
        >>> file = f"file://{tempfile.mkdtemp()}/init"  # torchrun does this with a port
        >>> dist.init_process_group("gloo", init_method=file, rank=0, world_size=1)
        >>> distribute(learner).group.size
        1
        >>> dist.destroy_process_group()
    """
    check_kinds(Learner, learner=learner)
    if not dist.is_initialized():
        raise RuntimeError(
            "distribute needs connected processes: start the script with `torchrun --nproc-per-node=2 SCRIPT` and call "
            "torch.distributed.init_process_group() first"
        )
    group = dist.group.WORLD if group is None else group
    assert group is not None
    _check_alike(learner, group)
    states = [_on_cpu(learner.state_dict())]
    dist.broadcast_object_list(states, group=group, group_src=0)
    learner.load_state_dict(states[0])
    learner.group = LearnerGroup(learner, group)
    return learner


class LearnerGroup:
    """The processes that train one learner: averages their gradients, and lets sums run over all their batches.

    Args:
        learner: of this process.
        group: the processes.

    Attributes:
        size: their number.
    """

    def __init__(self, learner: Learner, group: dist.ProcessGroup) -> None:
        self.size = group.size()
        self._group = group
        _groups.add(group)
        self._device = next(learner.world_model.parameters()).device
        # The state is the same already. Buffers are statistics over all processes, never those of the first.
        options: dict[str, Any] = {"process_group": group, "forward_sync_buffers": False, "init_sync": False}
        self._averaged = {
            loss: DistributedDataParallel(_Losses(loss), **options)
            for loss in (learner.world_model_loss, learner.actor_loss, learner.critic_loss)
        }

    def together(self, batch: TensorDictBase) -> AbstractContextManager[None]:
        """Return a context in which sums run over all processes.

        Args:
            batch: this process's part of the whole batch; the parts of all processes have the same size.

        Raises:
            ValueError: in all processes, if the sizes differ. This is checked on CPUs only, since on a GPU the check
                would make the host wait for the device.
        """
        if guard.can_wait(self._device):
            with learning_together(self._group):
                sizes = gather_from_processes(torch.tensor([[*batch.shape[:1], batch.numel()]])).tolist()
            for rank, size in enumerate(sizes):
                if size != sizes[0]:
                    raise ValueError(
                        f"process {rank} has a part of {size[0]} rows with {size[-1]} steps in all, process 0 one of "
                        f"{sizes[0][0]} with {sizes[0][-1]}: give every process a part of the same size, as the "
                        "settings of split_run do"
                    )
        return learning_together(self._group)

    def losses(self, loss: LossModule, batch: TensorDictBase) -> TensorDictBase:
        """Return the losses of a batch; their gradients are averaged over the processes during the backward pass."""
        return TensorDict(self._averaged[loss](batch))


class _Losses(nn.Module):
    """A loss for DistributedDataParallel, which finds the tensors of a plain dict, but not those of a TensorDict."""

    def __init__(self, loss: LossModule) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, batch: TensorDictBase) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.loss(batch).to_dict()
        return losses


def _check_alike(learner: Learner, group: dist.ProcessGroup) -> None:
    """Raise an error if processes have different learners, or draw the same random numbers."""
    here = (learner.built, learner.config, zlib.crc32(torch.get_rng_state().numpy().tobytes()))
    everywhere: list[Any] = [None] * group.size()
    dist.all_gather_object(everywhere, here, group=group)
    first = everywhere[0]
    seen: dict[int, int] = {}
    for rank, (built, config, random) in enumerate(everywhere):
        check_built(built, first[0], source=f"the learner of process {rank}")
        if config != first[1]:
            raise ValueError(f"process {rank} has other settings of the learner than process 0: {config}, {first[1]}")
        if random in seen:
            raise ValueError(
                f"processes {seen[random]} and {rank} draw the same random numbers, and would imagine the same: call "
                "torch.manual_seed(seed + rank) before distribute"
            )
        seen[random] = rank


def _on_cpu(state: Any) -> Any:
    """Return a state whose tensors can be sent to a process with another device."""
    if isinstance(state, Tensor):
        return state.cpu()
    return {name: _on_cpu(value) for name, value in state.items()} if isinstance(state, dict) else state
