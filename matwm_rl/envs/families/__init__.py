"""The library's own families of environments; their packages are imported only when one is made.

Importing this package registers them.
"""

from matwm_rl.envs.families.mock import make_mock
from matwm_rl.envs.families.pettingzoo import make_butterfly, make_mpe, wrap_pettingzoo
from matwm_rl.envs.families.vmas import make_vmas

__all__ = ["make_butterfly", "make_mock", "make_mpe", "make_vmas", "wrap_pettingzoo"]
