"""Train MATWM on any multi-agent environment, with one seed or several. The loop is that of simple_tag.py.

    python examples/train.py --help
    python examples/train.py env=mpe2/simple_spread_v3 total_steps=10000
    python examples/train.py env=my_package.my_module:make_my_env env_kwargs.max_cycles=50
    python examples/train.py -m seed=0,1,2   # a run for each seed in one folder, with a table and a picture over seeds

The folder of a run gets summary.json, metrics.csv, TensorBoard events, pictures, the policy, and a checkpoint.
"""

import sys

import hydra
from omegaconf import DictConfig
from simple_tag import train

from matwm_rl import runs


@hydra.main(version_base=None, config_name="train")
def main(composed: DictConfig) -> None:
    train(runs.to_config(composed))


if __name__ == "__main__":
    sys.path.insert(0, "")  # for modules of your own in the folder in which you start the script
    sys.argv[1:] = runs.command_line(sys.argv[1:])
    main()
