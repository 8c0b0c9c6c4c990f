"""Every default :class:`~tensordict.NestedKey` of the library, once.

Layout of the entries (N agents, A actions of the agent that has most, D features):

=============================================  ========================  =============================================
key                                            shape after batch dims    meaning
=============================================  ========================  =============================================
``("agents", "observation")``                  ``[N, D]``/``[N,C,S,S]``  padded vectors (float32) or images (uint8)
``("agents", "action")``                       ``[N]``                   categorical action (int64)
``("agents", "action_log_prob")``              ``[N]``                   log-probability that it was chosen with
``("agents", "action_mask")``                  ``[N, A]``                legal actions; False beyond an agent's own
``("agents", "alive")``                        ``[N]``                   the agent lives, its observation is real
``("agents", "teammate_action")``              ``[N, N-1]``              what the others did, in agent order
``("agents", "teammate_alive")``               ``[N, N-1]``              which of the others were alive
``("agents", "latent")``                       ``[N, Z]``                z_t as a feature vector
``("agents", "hidden")``                       ``[N, F]``                h_t, the summary of the steps before t
``("agents", "teammate_logits")``              ``[N, N-1, A]``           p_t, predicted action logits of the others
``("agents", "reconstruction")``               as the observation        decoded z_t; images from 0 to 1
``("agents", "mask_logits")``                  ``[N, A]``                predicted logits of the legal actions
``("agents", "logits")``                       ``[N, A]``                the actors' action logits
``("agents", "state_value_logits")``           ``[N, bins]``             the critics' two-hot logits
``("agents", "state_value")``                  ``[N, 1]``                V(s_t)
``("agents", "slow_value")``                   ``[N, 1]``                V(s_t) of the critics' EMA copy
``("agents", "lambda_return")``                ``[N, 1]``                G_t
``("agents", "weight")``                       ``[N, 1]``                chance that the imagined episode has not ended
``("next", "agents", "observation")``          as the observation        o_{t+1}; at an episode's end its true last
``("next", "agents", "reward")``               ``[N, 1]``                reward of the step
``("next", "agents", "alive")``                ``[N]``                   the agent lives after the step
``("next", "agents", "done")``                 ``[N, 1]``                the agent's slice changes episode next
``("next", "agents", "terminated")``           ``[N, 1]``                ... by termination, not by truncation
``("next", "agents", "truncated")``            ``[N, 1]``                a time limit of its own took the agent out
``("next", "agents", "posterior")``            ``[N, K, C]``             parameters of z_{t+1}, from o_{t+1}
``("next", "agents", "prior")``                ``[N, K, C]``             parameters of z_{t+1}, predicted from h
``("next", "agents", "dynamics_kl")``          ``[N, 1]``                KL of posterior and prior; moves the prior
``("next", "agents", "representation_kl")``    ``[N, 1]``                the same value; moves the posterior
``("next", "agents", "reward_logits")``        ``[N, bins]``             predicted two-hot logits of the reward
``("next", "agents", "end_reward_logits")``    ``[N, bins]``             the same, of an agent's last step
``("next", "agents", "continuation_logits")``  ``[N, 1]``                predicted logit of c_t
``("next", "agents", "continuation")``         ``[N, 1]``                predicted probability of c_t
``("next", "done")``                           ``[1]``                   the whole episode ends after the step
``("next", "terminated")``                     ``[1]``                   ... by termination
``("next", "truncated")``                      ``[1]``                   ... by a time limit
``"episode"``                                  ``[1]``                   how often the environment was reset (int64)
=============================================  ========================  =============================================

Where actions are continuous (:class:`~matwm_rl.box_actions.BoxActions`), A is the most numbers in an agent's action.
Actions have these in a last dimension of their own, ``("agents", "action")`` ``[N, A]`` float32 from -1 to 1 and
``("agents", "teammate_action")`` ``[N, N-1, A]``. ``"logits"`` and ``"teammate_logits"`` hold 2 A numbers each, the
parameters of a distribution in place of logits. ``"action_mask"`` tells which numbers an agent has.

The parameters of z_{t+1} are, for each of K latent dimensions, log-probabilities of C classes, or the mean and the log
standard deviation of a Gaussian (then C is 2). :class:`~matwm_rl.modules.WorldModelPolicy` lists what policies carry
through an episode.
"""

from tensordict import NestedKey

AGENTS = "agents"

OBSERVATION: NestedKey = (AGENTS, "observation")
ACTION: NestedKey = (AGENTS, "action")
ACTION_LOG_PROB: NestedKey = (AGENTS, "action_log_prob")
ACTION_MASK: NestedKey = (AGENTS, "action_mask")
ALIVE: NestedKey = (AGENTS, "alive")
TEAMMATE_ACTION: NestedKey = (AGENTS, "teammate_action")
TEAMMATE_ALIVE: NestedKey = (AGENTS, "teammate_alive")

LATENT: NestedKey = (AGENTS, "latent")
HIDDEN: NestedKey = (AGENTS, "hidden")
TEAMMATE_LOGITS: NestedKey = (AGENTS, "teammate_logits")

RECONSTRUCTION: NestedKey = (AGENTS, "reconstruction")
MASK_LOGITS: NestedKey = (AGENTS, "mask_logits")
POSTERIOR: NestedKey = ("next", AGENTS, "posterior")
PRIOR: NestedKey = ("next", AGENTS, "prior")
DYNAMICS_KL: NestedKey = ("next", AGENTS, "dynamics_kl")
REPRESENTATION_KL: NestedKey = ("next", AGENTS, "representation_kl")
REWARD_LOGITS: NestedKey = ("next", AGENTS, "reward_logits")
END_REWARD_LOGITS: NestedKey = ("next", AGENTS, "end_reward_logits")
CONTINUATION_LOGITS: NestedKey = ("next", AGENTS, "continuation_logits")

LOGITS: NestedKey = (AGENTS, "logits")
STATE_VALUE_LOGITS: NestedKey = (AGENTS, "state_value_logits")
STATE_VALUE: NestedKey = (AGENTS, "state_value")
SLOW_VALUE: NestedKey = (AGENTS, "slow_value")
LAMBDA_RETURN: NestedKey = (AGENTS, "lambda_return")
WEIGHT: NestedKey = (AGENTS, "weight")

NEXT_OBSERVATION: NestedKey = ("next", AGENTS, "observation")
NEXT_ALIVE: NestedKey = ("next", AGENTS, "alive")
REWARD: NestedKey = ("next", AGENTS, "reward")
CONTINUATION: NestedKey = ("next", AGENTS, "continuation")
AGENT_DONE: NestedKey = ("next", AGENTS, "done")
AGENT_TERMINATED: NestedKey = ("next", AGENTS, "terminated")
AGENT_TRUNCATED: NestedKey = ("next", AGENTS, "truncated")

DONE: NestedKey = ("next", "done")
TERMINATED: NestedKey = ("next", "terminated")
TRUNCATED: NestedKey = ("next", "truncated")

EPISODE: NestedKey = "episode"
