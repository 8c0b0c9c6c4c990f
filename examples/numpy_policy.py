"""A trained policy without PyTorch: NumPy and onnxruntime play mpe2's simple_spread with an exported file.

Write the file first, where matwm_rl[onnx] is installed::

    import matwm_rl as mw
    from matwm_rl.training import export_policy
    export_policy(mw.load_policy("simple_spread"), "policy.onnx")
"""

import json
import sys

import numpy as np
import onnxruntime
from mpe2 import simple_spread_v3

TYPES = {"tensor(float)": np.float32, "tensor(int16)": np.int16, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}


class NumpyPolicy:
    def __init__(self, path, seed=0):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # a decision is small
        self.session = onnxruntime.InferenceSession(path, options)
        self.layout = json.loads(self.session.get_modelmeta().custom_metadata_map["layout"])
        self.random = np.random.default_rng(seed)

    def reset(self, num_envs=1):
        """Return all inputs at the start of episodes, as zeros."""
        return {i.name: np.zeros((num_envs, *i.shape[1:]), TYPES[i.type]) for i in self.session.get_inputs()}

    def act(self, inputs, sample=True):
        """Return actions [E, N], or [E, N, A] from -1 to 1, and write the history of the next step into the inputs."""
        if "noise" in inputs:
            inputs["noise"] = self.random.random(inputs["noise"].shape, np.float32)
        outputs = dict(zip((o.name for o in self.session.get_outputs()), self.session.run(None, inputs), strict=True))
        if sample:
            outputs["action"] = self.draw(outputs["logits"])
            outputs["next_history_action"][:, :, -1] = outputs["action"]
        inputs.update({name[5:]: value for name, value in outputs.items() if name.startswith("next_")})
        return outputs["action"]

    def draw(self, logits):
        if self.layout["actions"]["kind"] == "discrete":  # the largest of the logits with Gumbel noise
            return (logits + self.random.gumbel(size=logits.shape)).argmax(-1)
        x, y = np.split(logits, 2, -1)  # minus infinity where an agent has fewer numbers than others
        loc, scale = np.tanh(x), 0.1 + 0.9 / (1 + np.exp(-y - 2))
        drawn = self.random.normal(loc, scale)
        while (outside := np.abs(drawn) > 1).any():
            drawn[outside] = self.random.normal(loc, scale)[outside]
        return np.where(np.isfinite(x), drawn, 0).astype(np.float32)

    def in_units(self, agent, action):
        """Return an agent's continuous action [A] as its environment takes it."""
        low, high = (np.array(self.layout["actions"][bound][agent]) for bound in ("low", "high"))
        return low + (action[: len(low)] + 1) / 2 * (high - low)


def main(path="policy.onnx", episodes=20):
    policy, env, returns = NumpyPolicy(path), simple_spread_v3.parallel_env(max_cycles=25), []
    for episode in range(episodes):
        observations, _ = env.reset(seed=episode)
        inputs, total = policy.reset(), 0.0
        inputs["action_mask"][:] = inputs["alive"][:] = True
        while env.agents:
            for n, agent in enumerate(policy.layout["agent_names"]):
                inputs["observation"][0, n] = observations[agent]
            actions = policy.act(inputs)[0]
            observations, rewards, *_ = env.step(dict(zip(policy.layout["agent_names"], actions, strict=True)))
            total += sum(rewards.values()) / len(rewards)
        returns.append(total)
    print(f"mean return of {episodes} episodes: {np.mean(returns):.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
