from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from matwm_rl import keys, presets
from matwm_rl.action_space import DiscreteActions
from matwm_rl.modules import (
    HiddenReward,
    HiddenRewardConfig,
    Imagination,
    ObservationReward,
    ObservationRewardConfig,
    PointDistances,
    RewardConfig,
    RewardHead,
    RunningNorm,
    State,
    Transition,
    WorldModel,
    make_actor,
)
from matwm_rl.objectives import WorldModelLoss
from tests.helpers import (
    COUNTS,
    LATENTS,
    SIZE,
    grads,
    make_layout,
    make_model,
    random_batch,
    random_latent,
    randomize,
    total,
)

N = len(COUNTS)
GROUPS = [0, 0, 1]
ACTIONS = DiscreteActions(COUNTS)
OTHERS = {"actions": ACTIONS, "group_index": GROUPS}


def observed(before: Tensor, action: Tensor, after: Tensor, norm: RunningNorm | None = None) -> Transition:
    """A transition of which only the observations and the action may be read."""

    def forbidden() -> Tensor:
        raise AssertionError("read without need")

    nothing = torch.zeros(())
    return Transition(nothing, action, nothing, forbidden, lambda: before, lambda: after, norm)


def random_step(*shape: int) -> Transition:
    """A step of observations of 4 numbers."""
    action = torch.randint(3, (N, *shape))
    return observed(torch.randn(N, *shape, 4), action, torch.randn(N, *shape, 4))


def make_head(depth: int = 2, fourier_features: int = 0, point_size: int = 0, bins: int = 6) -> ObservationReward:
    features = {"depth": depth, "fourier_features": fourier_features, "point_size": point_size}
    return ObservationReward(4, bins, **OTHERS, num_cells=8, **features)


# -- transitions -----------------------------------------------------------------------------------------------------


def test_a_transition_computes_what_is_read_when_it_is_read_and_once() -> None:
    computed: list[str] = []

    def compute(name: str, value: float) -> Tensor:
        computed.append(name)
        return torch.tensor(value)

    names = ["next_latent", "observation", "next_observation"]
    step = Transition(
        torch.tensor(1.0),
        torch.tensor(2),
        torch.tensor(3.0),
        *(
            lambda name=name, value=value: compute(name, value)
            for name, value in zip(names, (4.0, 5.0, 6.0), strict=True)
        ),
    )
    assert [step.latent.item(), step.action.item(), step.hidden.item()] == [1.0, 2, 3.0] and not computed
    for name, value in (("next_observation", 6.0), ("next_latent", 4.0), ("observation", 5.0)):
        for _ in range(2):
            assert getattr(step, name).item() == value
        assert computed.count(name) == 1
    assert computed == ["next_observation", "next_latent", "observation"]


@torch.no_grad()
@pytest.mark.parametrize(("reward", "decoded"), [(HiddenRewardConfig(), 0), (ObservationRewardConfig(), 2)])
def test_imagination_decodes_only_where_the_reward_is_read_from_observations(
    reward: RewardConfig, decoded: int
) -> None:
    model = make_model(reward=reward)
    calls: list[None] = []
    model.decoder.register_forward_hook(lambda *_: calls.append(None))
    Imagination(model, make_actor(model), horizon=3)(random_batch(2, 3))
    assert len(calls) == decoded


# -- reward from h ---------------------------------------------------------------------------------------------------


def test_the_papers_head_reads_h_and_starts_at_zero() -> None:
    head = HiddenRewardConfig().build([SIZE], 8, 6, **OTHERS, depth=2)
    assert isinstance(head, HiddenReward) and not head.reads_successor
    hidden = torch.randn(N, 5, 8)
    step = Transition(hidden, hidden, hidden, *[lambda: pytest.fail("read without need")] * 3)
    assert head(step).shape == (N, 5, 6) and not head(step).any()
    randomize(head)
    assert torch.equal(head(step), head.head(hidden))
    assert HiddenRewardConfig().build([3, 32, 32], 8, 6, **OTHERS, depth=2).head.output.weight.shape[0] == 2


# -- reward from observations and action -----------------------------------------------------------------------------


def test_an_observation_head_has_its_outer_layers_per_group() -> None:
    head = randomize(make_head(fourier_features=2))
    out = head(random_step(5, 2))
    assert out.shape == (3, 5, 2, 6)
    outer = {"input.weight", "input.bias", "output.weight", "output.bias"}
    for agent, group in enumerate(GROUPS):
        for name, parameter in head.named_parameters():
            (grad,) = grads(out[agent].square().sum(), [parameter])
            if name in outer:
                assert parameter.shape[0] == 2
                assert grad[group].any() and not grad[1 - group].any(), name
            else:
                assert grad.any(), name


@pytest.mark.parametrize("depth", [1, 3])
def test_an_observation_head_starts_at_zero_and_counts_its_layers(depth: int) -> None:
    head = make_head(depth)
    assert sum(isinstance(module, nn.LayerNorm) for module in head.modules()) == depth
    out = head(random_step(5))
    assert not out.any()
    # Nothing is predicted before anything is learnt; then the last layer learns.
    (grad,) = grads(-out.log_softmax(-1)[..., 0].mean(), [head.output.weight])
    assert grad.any()


@pytest.mark.parametrize("point_size", [0, 2])
def test_an_observation_head_reads_where_one_is_what_changed_and_the_action(float64: None, point_size: int) -> None:
    """By loops over agents and steps, in the units of the norm."""
    head = randomize(make_head(fourier_features=1, point_size=point_size, bins=2))
    norm = RunningNorm(4, group_index=GROUPS)
    norm.update(torch.randn(N, 50, 4) * torch.tensor([1.0, 2.0, 0.001, 7.0]) + 3.0)
    step = random_step(5)
    step.norm = norm
    out = head(step)
    for n, group in enumerate(GROUPS):
        for i in range(5):
            before, after, scale = step.observation[n, i], step.next_observation[n, i], norm.scale[group]
            where = fine = (after - norm.mean[group]) / scale
            if point_size:
                fine = PointDistances(4, size=2)(after.unsqueeze(0) / norm.unit[group])[0]
            angle = 0.5 * math.pi * fine
            features = [*([where] if point_size else []), fine, angle.sin(), angle.cos()]
            features += [((after - before) / scale / 0.05).asinh(), torch.eye(max(COUNTS))[step.action[n, i]]]
            first = torch.cat(features) @ head.input.weight[group] + head.input.bias[group]
            expected = head.trunk(first) @ head.output.weight[group] + head.output.bias[group]
            torch.testing.assert_close(out[n, i], expected)


def test_what_vanishes_is_rewarded_when_it_vanishes_and_not_afterwards() -> None:
    """Food that is eaten: the observation after it is the same at every later step, the reward is not."""
    torch.manual_seed(0)
    head = make_head()
    there, gone = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(N, 1, 4), torch.zeros(N, 1, 4)
    before, after = torch.cat([there, gone, there], 1), torch.cat([gone, gone, there], 1)
    step = observed(before, torch.zeros(N, 3, dtype=torch.long), after)
    target = torch.tensor([1, 0, 0]).expand(N, 3)
    optimizer = torch.optim.Adam(head.parameters(), 0.01)
    for _ in range(100):
        loss = nn.functional.cross_entropy(head(step).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(head(step).argmax(-1), target)


def test_the_config_sets_the_features_and_refuses_images() -> None:
    config = ObservationRewardConfig(depth=3, fourier_features=1, point_size=2)
    head = config.build([4], 8, 6, **OTHERS, depth=1)
    assert head.reads_successor and head.distances.size == 2
    assert head.input.weight.shape == (2, 4 + 3 * 3 + 4 + max(COUNTS), 8) and head.output.weight.shape == (2, 8, 6)
    assert sum(isinstance(module, nn.LayerNorm) for module in head.modules()) == 3
    with pytest.raises(ValueError, match="is for vector observations; for images take HiddenRewardConfig"):
        config.build([3, 32, 32], 8, 6, **OTHERS, depth=1)
    with pytest.raises(NotImplementedError):
        RewardConfig().build([4], 8, 6, **OTHERS, depth=1)


@torch.no_grad()
def test_in_training_observations_are_the_true_ones(float64: None) -> None:
    """At an episode's end it is the true final observation."""
    done = torch.zeros(2, 6, N, dtype=torch.bool)
    done[:, 2] = True
    model, batch = make_model(reward=ObservationRewardConfig()), random_batch(2, 6, done=done)

    def logits(batch: object) -> Tensor:
        torch.manual_seed(3)
        return model(batch.copy())[keys.REWARD_LOGITS]

    out = logits(batch)
    true = (batch[key].movedim(2, 0) for key in (keys.OBSERVATION, keys.ACTION, keys.NEXT_OBSERVATION))
    torch.testing.assert_close(out, model.reward(observed(*true)).movedim(0, 2))
    # What follows the reset is another observation; the step before it does not read that.
    assert (batch[keys.OBSERVATION][:, 3] != batch[keys.NEXT_OBSERVATION][:, 2]).all()
    for key in (keys.OBSERVATION, keys.NEXT_OBSERVATION):
        changed = batch.clone()
        changed[key][:, 2] += 1.0
        differs = (logits(changed) != out).any(-1)
        assert differs[:, 2].all() and not differs[:, [0, 1, 3, 4, 5]].any()


def random_state(model: WorldModel, *shape: int) -> State:
    hidden = torch.randn(N, *shape, model.transformer.features)
    return State(random_latent(model.latent, N, *shape), hidden, torch.randn(N, *shape, N - 1, 4))


@torch.no_grad()
@pytest.mark.parametrize("latent", LATENTS)
def test_in_imagination_observations_are_decoded_latents(float64: None, latent: str) -> None:
    """And the reward is the expectation over the step being the last one and not."""
    model = make_model(latent=latent, reward=ObservationRewardConfig())
    state, reached, action = random_state(model, 50), random_state(model, 50), torch.zeros(N, 50, dtype=torch.long)
    reward, continuation = model.predict_outcome(state, action, reached)
    observations = model.decode(state.latent), action, model.decode(reached.latent)
    goes_on = model.two_hot.decode(model.reward(observed(*observations)))
    ends = model.two_hot.decode(model.end_reward(reached.hidden))
    probability = model.continuation(reached.hidden).squeeze(-1).sigmoid()
    torch.testing.assert_close(reward, probability * goes_on + (1 - probability) * ends)
    torch.testing.assert_close(continuation, probability)
    assert (reward.std(1) > 0).all() and not torch.allclose(goes_on, ends)


# -- reward heads of a user ------------------------------------------------------------------------------------------


class FromAll(RewardHead):
    """Reads everything that there is."""

    reads_successor = True

    def __init__(self, model_size: int, latent_size: int, num_bins: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * SIZE + 2 * latent_size + model_size, num_bins)
        self.of_action = nn.Embedding(max(COUNTS), num_bins)

    def forward(self, step: Transition) -> Tensor:
        read = [step.observation, step.next_observation, step.latent, step.next_latent, step.hidden]
        return self.linear(torch.cat(read, -1)) + self.of_action(step.action)


@pytest.fixture
def of_all() -> WorldModel:
    """Deterministic, so that two passes agree."""
    return make_model(latent="gaussian", parts={"reward": FromAll(16, 4, 255)}).eval()


def test_a_head_of_a_user_reads_all_of_a_transition_in_training(float64: None, of_all: WorldModel) -> None:
    batch = random_batch(2, 6)
    out = of_all(batch.copy())
    observation, following = (batch[key].movedim(2, 0) for key in (keys.OBSERVATION, keys.NEXT_OBSERVATION))
    latent, action = of_all.encode(observation), batch[keys.ACTION].movedim(2, 0)
    tokens = of_all.action_mixer(latent, action)
    for n, b in ((0, 0), (1, 1), (2, 0)):
        # The steps of one episode, where h is that of the sequence alone.
        end = min([*batch[keys.AGENT_DONE][b, :, n, 0].tolist(), True].index(True) + 1, 6)
        hidden = of_all.transformer(tokens[n, b, :end].unsqueeze(0), torch.ones(end, end, dtype=torch.bool).tril())[0]
        read = [observation[n, b, :end], following[n, b, :end], latent[n, b, :end]]
        read += [of_all.encode(following)[n, b, :end], hidden]
        expected = of_all.reward.linear(torch.cat(read, -1)) + of_all.reward.of_action.weight[action[n, b, :end]]
        torch.testing.assert_close(out[keys.REWARD_LOGITS][b, :end, n], expected, rtol=1e-5, atol=1e-6)
    # It reads what an agent does not have after its last step: that has a head of its own.
    assert keys.END_REWARD_LOGITS in of_all.out_keys
    losses = WorldModelLoss(of_all)(batch)
    assert all(grad.any() for grad in grads(total(losses), of_all.reward.parameters()))


@torch.no_grad()
def test_a_head_of_a_user_reads_all_of_a_transition_in_imagination(float64: None, of_all: WorldModel) -> None:
    state, reached, action = random_state(of_all, 7), random_state(of_all, 7), torch.randint(3, (N, 7))
    reward, continuation = of_all.predict_outcome(state, action, reached)
    read = [of_all.decode(state.latent), of_all.decode(reached.latent), state.latent, reached.latent, reached.hidden]
    logits = of_all.reward.linear(torch.cat(read, -1)) + of_all.reward.of_action.weight[action]
    ends = of_all.two_hot.decode(of_all.end_reward(reached.hidden))
    expected = continuation * of_all.two_hot.decode(logits) + (1 - continuation) * ends
    torch.testing.assert_close(reward, expected)


@pytest.mark.parametrize("reads_successor", [True, False])
def test_last_steps_have_a_head_of_their_own_where_successors_are_read(reads_successor: bool) -> None:
    class FromHidden(HiddenReward):
        pass

    FromHidden.reads_successor = reads_successor
    model = make_model(parts={"reward": FromHidden(nn.Linear(16, 255))})
    assert (model.end_reward is not None) is (keys.END_REWARD_LOGITS in model.out_keys) is reads_successor


def test_a_reward_head_with_another_number_of_outputs_is_named() -> None:
    model = make_model()
    model.reward.head = nn.Linear(model.transformer.features, 3)
    message = r"the reward head HiddenReward must give logits of shape \[.*, 255\], found \[.*, 3\]"
    with pytest.raises(ValueError, match=message):
        model(random_batch())
    with pytest.raises(ValueError, match=message):
        model.predict_outcome(random_state(model, 5), torch.zeros(N, 5, dtype=torch.long), random_state(model, 5))


# ---------------------------------------------------------------------- wide observations


@pytest.mark.parametrize(("size", "has_distances"), [(34, True), (88, True), (89, False), (512, False)])
def test_wide_observations_are_read_without_distances(size: int, has_distances: bool) -> None:
    head = ObservationRewardConfig().build([size], 128, 255, actions=DiscreteActions([5]), group_index=[0], depth=1)
    assert isinstance(head, ObservationReward)
    assert (head.distances is not None) == has_distances
    assert sum(parameter.numel() for parameter in head.parameters()) < 1_500_000


def test_the_vectors_preset_of_wide_observations_is_small() -> None:
    def parameters(size: int) -> int:
        layout = make_layout([3, 3], [0, 0], (size,))
        model = WorldModel.from_env(layout, presets.vectors().world_model)
        return sum(parameter.numel() for parameter in model.parameters())

    assert parameters(512) - parameters(16) < 2_000_000
