"""The library's own families of environments; their packages are imported only when one is made.

Importing this package registers them.
"""

from matwm_rl.envs.families.gymnasium import make_lbforaging, make_rware
from matwm_rl.envs.families.mamujoco import make_mamujoco
from matwm_rl.envs.families.mock import make_mock
from matwm_rl.envs.families.named import construct, unknown_environment
from matwm_rl.envs.families.pettingzoo import make_butterfly, make_magent2, make_mpe, make_sisl, wrap_pettingzoo
from matwm_rl.envs.families.tuple_game import TupleGame
from matwm_rl.envs.families.vmas import make_vmas

__all__ = [
    "TupleGame",
    "construct",
    "make_butterfly",
    "make_lbforaging",
    "make_magent2",
    "make_mamujoco",
    "make_mock",
    "make_mpe",
    "make_rware",
    "make_sisl",
    "make_vmas",
    "unknown_environment",
    "wrap_pettingzoo",
]
