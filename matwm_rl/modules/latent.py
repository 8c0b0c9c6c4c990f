"""Latent codes: what lies between the encoder and everything else. Exchangeable, with one interface.

A code turns the encoder's features into the distributions of K code dimensions, and draws z_t from them; it does the
same with what the dynamics predictor says of z_{t+1}. Distributions travel as one tensor of their parameters:
log-probabilities ``[..., K, C]`` of codes of C classes, means and log standard deviations ``[..., K, 2]`` of Gaussians.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from matwm_rl.functional import balanced_gaussian_kl, balanced_kl, may_need_gradient, sample_index, at_least_float32
from matwm_rl.modules.stacked import StackedLinear

MIN_LOG_PROB = -30.0
"""Smaller probabilities mean nothing, and soon are denormal numbers, on which CPUs are twenty times slower."""


@dataclass
class Latent:
    """Latents z.

    Attributes:
        value: the features, ``[..., Z]``.
        ones: where z is multi-hot, the positions of its ones, int64 ``[..., K]``: layers that need no gradient through
            z look rows of their weights up in place of a product. ``None`` for other codes.

    Examples:
        >>> z = CategoricalLatent(2, num_classes=3).from_code(torch.tensor([[0, 2], [1, 1]]))
        >>> z.ones.tolist(), z[1].value.tolist()
        ([[0, 5], [1, 4]], [0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    """

    value: Tensor
    ones: Tensor | None = None

    def __getitem__(self, index: Any) -> Latent:
        """Index the batch dimensions."""
        return Latent(self.value[index], None if self.ones is None else self.ones[index])

    def detach(self) -> Latent:
        """The same latents, without gradient."""
        return Latent(self.value.detach(), self.ones)

    @staticmethod
    def stack(latents: list[Latent], dim: int) -> Latent:
        """Stack along a new batch dimension."""
        ones = [latent.ones for latent in latents if latent.ones is not None]
        return Latent(torch.stack([latent.value for latent in latents], dim), torch.stack(ones, dim) if ones else None)


def read_latent(layer: StackedLinear, latent: Latent) -> Tensor:
    """Apply a first layer to latents, by look-up where z is multi-hot and no gradient is wanted through it.

    Args:
        layer: the layer, of Z inputs.
        latent: z, ``[N, *batch, Z]``.

    Returns:
        ``[N, *batch, out_features]``.

    Examples:
        >>> layer, code = StackedLinear(8, 3, [0]), CategoricalLatent(2, 4)
        >>> latent = code.from_code(torch.tensor([[[1, 3]]]))
        >>> torch.allclose(read_latent(layer, latent), layer(latent.value), atol=1e-6)
        True
    """
    if latent.ones is None or may_need_gradient(latent.value):
        return layer(latent.value)
    return layer.from_ones(latent.ones)


class LatentCode(nn.Module):
    """Interface of a latent code z_t (section 2) with ``num_dims`` (K) independent dimensions.

    Args:
        num_dims: K.

    Attributes:
        encoder_size: number of features the encoder must deliver.
        latent_size: size Z of the feature vector z.
        dynamics_size: number of outputs the dynamics predictor must deliver.
        multi_hot: whether latents have ``ones``.
        code_dtype: type in which codes ``[..., K]`` (:meth:`to_code`) are stored.
        coordinate_scale: factor on coordinates that the code's dimensions are to hold as they are; ``None`` where a
            dimension is no number.
        spacing: of the values that a dimension of z can have; 0 where it can have all.

    Raises:
        ValueError: if there is no dimension.

    Examples:
        >>> class HalfPrecision(GaussianLatent):
        ...     code_dtype = torch.float16
        ...
        ...     def from_code(self, code: Tensor) -> Latent:
        ...         return Latent(code.float())
        >>> code = HalfPrecision(2)
        >>> stored = code.to_code(Latent(torch.tensor([0.1, 2.0]))).to(code.code_dtype)
        >>> code.from_code(stored).value
        tensor([0.1000, 2.0000])
    """

    multi_hot = False
    code_dtype: torch.dtype
    coordinate_scale: float | None = None
    spacing = 0.0
    encoder_size: int
    latent_size: int
    dynamics_size: int

    def __init__(self, num_dims: int) -> None:
        super().__init__()
        if num_dims < 1:
            raise ValueError(f"a code needs >= 1 dimension, got {num_dims}")
        self.num_dims = num_dims

    def posterior(self, features: Tensor) -> Tensor:
        """Encoder features ``[..., encoder_size]`` to the posterior's parameters ``[..., K, C]``."""
        raise NotImplementedError

    def sample_posterior(self, features: Tensor) -> Latent:
        """Encoder features ``[..., encoder_size]`` to z ``[..., Z]``, with gradients to the features."""
        raise NotImplementedError

    def prior(self, output: Tensor, latent: Latent) -> Tensor:
        """Parameters of z_{t+1} ``[..., K, C]``, given the dynamics predictor's output and z_t.

        Args:
            output: ``[..., dynamics_size]``.
            latent: z_t.
        """
        raise NotImplementedError

    def sample_prior(self, output: Tensor, latent: Latent) -> Latent:
        """Draw z_{t+1} ``[..., Z]`` from what :meth:`prior` describes, without gradient."""
        return self.draw(self.prior(output.detach(), latent.detach()))

    def draw(self, parameters: Tensor) -> Latent:
        """Draw z ``[..., Z]``, without gradient, from parameters as the world model's forward pass writes them."""
        raise NotImplementedError

    def balanced_kl(self, posterior: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """KL of the posterior from the prior, summed over K: once to move the prior only, once the posterior only.

        Args:
            posterior: parameters ``[..., K, C]``.
            prior: parameters ``[..., K, C]``.

        Returns:
            ``(dynamics, representation)``, each ``[...]``, in nats.
        """
        raise NotImplementedError

    def to_code(self, latent: Latent) -> Tensor:
        """The shortest form of z, ``[..., Z]`` to ``[..., K]``: what is stored of it, as ``code_dtype``."""
        raise NotImplementedError

    def from_code(self, code: Tensor) -> Latent:
        """Invert :meth:`to_code`: codes ``[..., K]``, of any type that holds them, to z ``[..., Z]``."""
        raise NotImplementedError


class DiscreteLatent(LatentCode):
    """Codes whose dimensions are of ``num_classes`` (C) classes each; :meth:`to_code` gives class indices.

    Args:
        num_dims: K.
        num_classes: C.

    Raises:
        ValueError: if there is no dimension, or there are fewer than two classes.

    Examples:
        >>> code: DiscreteLatent = CategoricalLatent(2, num_classes=3)
        >>> log_probs = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).log()
        >>> code.to_code(code.draw(log_probs)).tolist()
        [0, 2]
    """

    code_dtype = torch.int16

    def __init__(self, num_dims: int, num_classes: int) -> None:
        super().__init__(num_dims)
        if num_classes < 2:
            raise ValueError(f"a discrete code needs >= 2 classes, got {num_classes}")
        self.num_classes = num_classes

    def draw(self, parameters: Tensor) -> Latent:
        """Draw z ``[..., Z]`` from log-probabilities ``[..., K, C]``."""
        return self.from_code(sample_index(parameters.exp()))

    def balanced_kl(self, posterior: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`~matwm_rl.functional.balanced_kl`."""
        return balanced_kl(posterior, prior)


class CategoricalLatent(DiscreteLatent):
    """The paper's code: K categoricals of C classes, one-hot, straight-through, with unimix (section 2).

    Args:
        num_dims: K.
        num_classes: C.
        unimix: share of the uniform distribution mixed into all probabilities.

    Raises:
        ValueError: see :class:`DiscreteLatent`.

    Examples:
        >>> code = CategoricalLatent(4, 8)
        >>> z = code.sample_posterior(torch.randn(2, code.encoder_size))
        >>> z.value.shape, z.value.sum(-1).tolist(), z.ones.shape
        (torch.Size([2, 32]), [4.0, 4.0], torch.Size([2, 4]))
    """

    multi_hot = True
    first: Tensor
    one: Tensor

    def __init__(self, num_dims: int = 32, num_classes: int = 32, *, unimix: float = 0.01) -> None:
        super().__init__(num_dims, num_classes)
        self.unimix = unimix
        self.encoder_size = self.latent_size = self.dynamics_size = num_dims * num_classes
        # Position of every dimension's first class; and a one, in the type that the model computes in.
        self.register_buffer("first", torch.arange(0, self.latent_size, num_classes), persistent=False)
        self.register_buffer("one", torch.ones(()), persistent=False)

    def _probs(self, logits: Tensor) -> Tensor:
        probs = logits.unflatten(-1, (self.num_dims, self.num_classes)).softmax(-1)
        return (1 - self.unimix) * probs + self.unimix / self.num_classes

    def posterior(self, features: Tensor) -> Tensor:
        """Log-probabilities ``[..., K, C]`` with unimix."""
        # Computed apart from the probabilities: without unimix their logarithm would underflow.
        log_probs = features.unflatten(-1, (self.num_dims, self.num_classes)).log_softmax(-1)
        if not self.unimix:
            return log_probs
        uniform = math.log(self.unimix / self.num_classes)
        return torch.logaddexp(log_probs + math.log1p(-self.unimix), torch.full_like(log_probs, uniform))

    def prior(self, output: Tensor, latent: Latent) -> Tensor:
        """Logits to log-probabilities ``[..., K, C]`` with unimix; z_t plays no part."""
        return self.posterior(output)

    def sample_prior(self, output: Tensor, latent: Latent) -> Latent:
        """Sample one-hots ``[..., Z]``."""
        return self.from_code(sample_index(self._probs(output)))

    def sample_posterior(self, features: Tensor) -> Latent:
        """Sample one-hots; gradients pass to the probabilities (straight-through)."""
        probs = self._probs(features)
        sample = self.from_code(sample_index(probs.detach()))
        if not may_need_gradient(probs):
            return sample
        probs = probs.flatten(-2)
        return Latent(sample.value + (probs - probs.detach()), sample.ones)

    def from_code(self, code: Tensor) -> Latent:
        """Class indices to one-hots, flattened."""
        ones = code + self.first
        value = ones.new_zeros(*code.shape[:-1], self.latent_size, dtype=self.one.dtype)
        return Latent(value.scatter_(-1, ones, 1.0), ones)

    def to_code(self, latent: Latent) -> Tensor:
        """Class of the one in every one-hot."""
        if latent.ones is None:
            return latent.value.unflatten(-1, (self.num_dims, self.num_classes)).argmax(-1)
        return latent.ones - self.first


class _LogBell(torch.autograd.Function):
    """Log-probabilities of bells over the levels 0 .. C-1: ``log_softmax(-((level - centre) * scale)^2)``.

    By hand, because autograd walks over ``[..., K, C]`` a dozen times: the gradient needs two sums over the levels.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(centre: Tensor, scale: Tensor, levels: Tensor, limit: float) -> Tensor:
        bell = (levels - centre.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).square_().neg_()
        return bell.clamp_(min=limit).log_softmax(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3], output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        centre, scale, levels, log_probs = ctx.saved_tensors
        # Through the softmax; the result sums to zero over the levels, and what was clamped has no weight.
        grad = grad - log_probs.exp().mul_(grad.sum(-1, keepdim=True))
        first, second = (grad @ torch.stack([levels, levels.square()], -1)).unbind(-1)
        squared = second - 2 * centre * first
        return 2 * scale.square() * first, -2 * scale * squared, None, None


class FSQLatent(DiscreteLatent):
    """Finite scalar quantisation (arXiv:2309.15505): K numbers, each rounded to one of C levels in [-1, 1].

    Keeps the fine geometry of low-dimensional observations that one-hot categoricals lose. z is the nearest level,
    straight-through. The posterior is a narrow bell over the levels around the encoder's value, so that the KL terms of
    the paper are well-defined and differentiable. The prior is a bell too: for every dimension the dynamics predictor
    gives by how much it moves on from z_t, and a width. So neighbouring levels are alike, an untrained model predicts
    that nothing moves, and the model stays discrete.

    Args:
        num_dims: K.
        num_classes: C, levels per dimension.
        width: standard deviation of the posterior, in levels.

    Raises:
        ValueError: see :class:`DiscreteLatent`; or if ``width`` is not positive.

    Examples:
        >>> code = FSQLatent(3, num_classes=5)
        >>> z = code.sample_posterior(torch.tensor([[0.0, 10.0, -10.0]]))
        >>> z.value.tolist(), code.to_code(z).tolist()
        ([[0.0, 1.0, -1.0]], [[2, 4, 0]])
    """

    # From -2 to 2, tanh then bends observations by 14% at most.
    coordinate_scale = 0.35
    levels: Tensor

    def __init__(self, num_dims: int = 64, num_classes: int = 16, *, width: float = 0.25) -> None:
        super().__init__(num_dims, num_classes)
        self.width = _positive("width", width)
        self.spacing = 2 / (num_classes - 1)
        self.encoder_size = self.latent_size = num_dims
        self.dynamics_size = 2 * num_dims
        self.register_buffer("levels", torch.arange(num_classes, dtype=torch.get_default_dtype()), persistent=False)

    def _scale(self, features: Tensor) -> Tensor:
        return (features.tanh() + 1) * (0.5 * (self.num_classes - 1))

    def _log_bell(self, centre: Tensor, width: Tensor, limit: float = -math.inf) -> Tensor:
        """Log-probabilities ``[..., K, C]`` of bells around ``centre [..., K]``, of ``width`` levels."""
        return _LogBell.apply(centre, math.sqrt(0.5) / width, self.levels, limit)

    def posterior(self, features: Tensor) -> Tensor:
        """Log-probabilities ``[..., K, C]`` of a bell of ``width`` levels around the value before rounding."""
        return self._log_bell(self._scale(features), torch.full_like(features, self.width), MIN_LOG_PROB)

    def prior(self, output: Tensor, latent: Latent) -> Tensor:
        """Movements and widths ``[..., 2 K]`` from z_t to log-probabilities ``[..., K, C]``."""
        centre, width = self._moved(output, latent)
        # Not clamped: a prior that was sure and wrong must feel how far off it was.
        return self._log_bell(centre, width)

    def _moved(self, output: Tensor, latent: Latent) -> tuple[Tensor, Tensor]:
        """Centre and width of the prior's bell, in levels, ``[..., K]`` each."""
        movement, width = output.chunk(2, -1)
        width = nn.functional.softplus(width) + 0.5 * self.width
        return (latent.value + movement + 1) * (0.5 * (self.num_classes - 1)), width

    def sample_prior(self, output: Tensor, latent: Latent) -> Latent:
        """Draw levels, ``[..., Z]``."""
        centre, width = self._moved(output.detach(), latent.detach())
        scale = math.sqrt(0.5) / width
        # Against the likeliest level, and not normalised: the draw divides by the sum.
        likeliest = ((centre.clamp(0, self.num_classes - 1).round() - centre) * scale).square()
        distance = (
            (self.levels - centre.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).square_().sub_(likeliest.unsqueeze(-1))
        )
        return self.from_code(sample_index(distance.clamp_(max=-MIN_LOG_PROB).neg_().exp_()))

    def sample_posterior(self, features: Tensor) -> Latent:
        """Nearest level; gradients pass as if there were no rounding (straight-through)."""
        value = self._scale(features)
        value = value + (value.round() - value).detach() if may_need_gradient(value) else value.round()
        return Latent(value * (2 / (self.num_classes - 1)) - 1)

    def from_code(self, code: Tensor) -> Latent:
        """Level index to its value in [-1, 1]."""
        return Latent(code.to(self.levels.dtype) * (2 / (self.num_classes - 1)) - 1)

    def to_code(self, latent: Latent) -> Tensor:
        """Value in [-1, 1] to the nearest level's index."""
        return ((latent.value + 1) * (0.5 * (self.num_classes - 1))).round().long()


class GaussianLatent(LatentCode):
    """K numbers, each with a normal distribution (ours): for short vectors, whose geometry it keeps without rounding.

    The posterior is equally wide everywhere, and the KL terms measure distances in units of its width. z is drawn from
    it while training, and is its mean otherwise. For every dimension the dynamics predictor gives by how much it moves
    on from z_t, and a standard deviation.

    Args:
        num_dims: K.
        width: standard deviation of the posterior. Without this noise the encoder would escape the KL terms by
            shrinking the scale of z.
        step_scale: the movement that an output of 1 of the dynamics predictor stands for. Movements per step are small,
            and outputs of order 1 are what Adam learns well.
        spread_scale: the same for the standard deviation of the prior, which is never below half of ``width``.

    Raises:
        ValueError: if there is no dimension, or a width or scale is not positive.

    Examples:
        >>> code = GaussianLatent(3).eval()
        >>> z = code.sample_posterior(torch.tensor([[0.0, 10.0, -10.0]]))
        >>> z.value.tolist(), code.posterior(z.value)[..., 1].exp()
        ([[0.0, 10.0, -10.0]], tensor([[0.0200, 0.0200, 0.0200]]))
    """

    code_dtype = torch.float32
    coordinate_scale = 1.0

    def __init__(
        self, num_dims: int = 64, *, width: float = 0.02, step_scale: float = 0.4, spread_scale: float = 0.2
    ) -> None:
        super().__init__(num_dims)
        self.width = _positive("width", width)
        self.step_scale = _positive("step_scale", step_scale)
        self.spread_scale = _positive("spread_scale", spread_scale)
        self.encoder_size = self.latent_size = num_dims
        self.dynamics_size = 2 * num_dims

    def posterior(self, features: Tensor) -> Tensor:
        """Means and log standard deviations ``[..., K, 2]``."""
        mean = at_least_float32(features)
        return torch.stack([mean, torch.full_like(mean, math.log(self.width))], -1)

    def sample_posterior(self, features: Tensor) -> Latent:
        """A draw while training, with gradients through it; the mean otherwise."""
        mean = at_least_float32(features)
        return Latent(torch.add(mean, torch.randn_like(mean), alpha=self.width) if self.training else mean)

    def prior(self, output: Tensor, latent: Latent) -> Tensor:
        """Movements and widths ``[..., 2 K]`` from z_t to means and log standard deviations ``[..., K, 2]``."""
        movement, spread = at_least_float32(output).chunk(2, -1)
        deviation = self.spread_scale * nn.functional.softplus(spread) + 0.5 * self.width
        return torch.stack([latent.value + self.step_scale * movement, deviation.log()], -1)

    def draw(self, parameters: Tensor) -> Latent:
        """Draw z ``[..., Z]`` from means and log standard deviations ``[..., K, 2]``."""
        mean, log_deviation = at_least_float32(parameters.detach()).unbind(-1)
        return Latent(torch.addcmul(mean, log_deviation.exp(), torch.randn_like(mean)))

    def balanced_kl(self, posterior: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`~matwm_rl.functional.balanced_gaussian_kl`."""
        return balanced_gaussian_kl(posterior, prior)

    def to_code(self, latent: Latent) -> Tensor:
        """The numbers themselves."""
        return latent.value

    def from_code(self, code: Tensor) -> Latent:
        """The numbers themselves."""
        return Latent(code)


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} of a latent code must be positive, got {value}")
    return value


def make_latent(kind: str, num_dims: int, num_classes: int, width: float | None = None) -> LatentCode:
    """Build a code by name.

    Args:
        kind: ``"categorical"`` (the paper's), ``"fsq"`` or ``"gaussian"``.
        num_dims: K.
        num_classes: C; of no meaning for ``"gaussian"``.
        width: of the posterior of ``"fsq"`` or ``"gaussian"``; ``None``: the code's own default.

    Raises:
        ValueError: for any other name, or if a categorical code is given a width.

    Examples:
        >>> make_latent("fsq", 8, 4).latent_size
        8
    """
    options = {} if width is None else {"width": width}
    match kind:
        case "categorical":
            if options:
                raise ValueError(f"a categorical code has no width, got {width}; leave it None")
            return CategoricalLatent(num_dims, num_classes)
        case "fsq":
            return FSQLatent(num_dims, num_classes, **options)
        case "gaussian":
            return GaussianLatent(num_dims, **options)
    raise ValueError(f"unknown latent code {kind!r}; choose one of ['categorical', 'fsq', 'gaussian']")
