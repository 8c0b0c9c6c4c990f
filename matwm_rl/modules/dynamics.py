"""How latents move on: the distribution of z_{t+1}, given h and z_t (docs/algorithm.md, World model).

All tensors are agent-major: ``[N, *batch, F]``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from matwm_rl.arguments import check_kinds
from matwm_rl.checks import check_shape
from matwm_rl.modules.latents import LatentSpace


class DynamicsLoss(NamedTuple):
    """What :meth:`Dynamics.loss` gives, in nats, before free nats are taken off."""

    dynamics: Tensor
    """``[N, *batch]``; its gradient moves the dynamics."""
    representation: Tensor
    """``[N, *batch]``; its gradient moves the posterior, hence the encoder."""
    prior: Tensor | None = None
    """Parameters of the prior ``[N, *batch, K, C]``, where the dynamics have such."""


class Dynamics(nn.Module):
    """Interface of the dynamics, which predict z_{t+1} from h, the summary of the steps up to a_t, and from z_t.

    Give an object of a subclass to :meth:`WorldModel.from_env(env, dynamics=...)
    <matwm_rl.modules.WorldModel.from_env>` for dynamics of your own, such as a flow or a diffusion model.

    Examples:
        >>> import torch
        >>> from matwm_rl import presets
        >>> from matwm_rl.envs import make_env
        >>> from matwm_rl.modules import WorldModel
        >>> class Still(Dynamics):
        ...     def loss(self, hidden: Tensor, latent: Tensor, posterior: Tensor) -> DynamicsLoss:
        ...         zero = hidden.sum(-1) * 0.0
        ...         return DynamicsLoss(zero, zero)
        ...
        ...     def sample(self, hidden: Tensor, latent: Tensor) -> Tensor:
        ...         return latent
        >>> model = WorldModel.from_env(make_env("mock"), presets.tiny().world_model, dynamics=Still())
        >>> ("next", "agents", "prior") in model.out_keys
        False
    """

    has_prior = False
    """Whether :meth:`loss` also gives the parameters of a prior."""

    def loss(self, hidden: Tensor, latent: Tensor, posterior: Tensor) -> DynamicsLoss:
        """Say how wrong the prediction of z_{t+1} is.

        Args:
            hidden: h after (z_t, a_t), ``[N, *batch, F]``.
            latent: z_t, ``[N, *batch, Z]``.
            posterior: parameters of the posterior of z_{t+1}, ``[N, *batch, K, C]``.
        """
        raise NotImplementedError

    def sample(self, hidden: Tensor, latent: Tensor) -> Tensor:
        """Draw z_{t+1} ``[N, *batch, Z]``, without gradient."""
        raise NotImplementedError


class PriorDynamics(Dynamics):
    """The paper's dynamics: a head predicts the parameters of z_{t+1}; the loss is a balanced KL divergence.

    Args:
        head: ``[N, *batch, F]`` to ``space.dynamics_size`` outputs.
        space: the latent space. It belongs to the world model and is not registered here again.

    Raises:
        ValueError: if the head has another number of outputs.

    Examples:
        >>> import torch
        >>> from matwm_rl.modules import CategoricalLatentConfig
        >>> space = CategoricalLatentConfig(num_dims=2, num_classes=3).build()
        >>> dynamics = PriorDynamics(nn.Linear(8, space.dynamics_size), space)
        >>> dynamics.sample(torch.zeros(1, 5, 8), torch.zeros(1, 5, 6)).shape
        torch.Size([1, 5, 6])
    """

    has_prior = True
    space: LatentSpace

    def __init__(self, head: nn.Module, space: LatentSpace) -> None:
        super().__init__()
        check_kinds(nn.Module, head=head)
        check_kinds(LatentSpace, space=space)
        self.head = head
        self.__dict__["space"] = space

    def loss(self, hidden: Tensor, latent: Tensor, posterior: Tensor) -> DynamicsLoss:
        """See the base class."""
        prior = self.space.prior(self._output(hidden), latent)
        return DynamicsLoss(*self.space.balanced_kl(posterior, prior), prior)

    def sample(self, hidden: Tensor, latent: Tensor) -> Tensor:
        """See the base class."""
        return self.space.sample_prior(self._output(hidden), latent)

    def _output(self, hidden: Tensor) -> Tensor:
        what = "the dynamics predictor must give outputs"
        return check_shape(self.head(hidden), what, (*hidden.shape[:-1], self.space.dynamics_size))
