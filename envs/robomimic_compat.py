"""What robomimic 0.3 needs before it can be imported beside current packages: the one place that knows.

- Its robosuite environment imports ``mujoco_py``, abandoned since 2021, for the name of one exception. A
  stand-in with that name serves; robosuite itself uses MuJoCo's own bindings.
- It imports ``six`` without asking for it; the extra ``robomimic`` does.
- robosuite warns at every import of optional parts that are not there, and robomimic prints which
  observations are images; neither says anything about this package.
- ``robomimic.utils.file_utils``, ``train_utils``, ``models`` and ``algo`` import torchvision, which must
  match torch's build. Nothing here needs them: a file's ``env_args`` are read with h5py, and ``envs``,
  ``obs_utils`` and ``dataset`` do without.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import sys
from types import ModuleType
from typing import Any

_IMAGE_KEYS: set[str] = set()


def robosuite_class() -> Any:
    """``robomimic.envs.env_robosuite.EnvRobosuite``.

    Raises:
        ImportError: robomimic, robosuite or something they import is not installed.
    """
    _stand_in_for_mujoco_py()
    logging.getLogger("robosuite_logs").addFilter(lambda record: record.levelno > logging.WARNING)
    from robomimic.envs.env_robosuite import EnvRobosuite

    return EnvRobosuite


def environment_names() -> frozenset[str]:
    """Names of robosuite's environments, as in ``env_args``."""
    import robosuite

    return frozenset(robosuite.ALL_ENVIRONMENTS)


def register_image_keys(keys: list[str]) -> None:
    """Tell robomimic which observations are images, so that it turns them the right way up.

    Its register is one for the whole process and is replaced at each call: other environments' keys stay in.
    """
    import robomimic.utils.obs_utils as observations

    _IMAGE_KEYS.update(keys)
    with contextlib.redirect_stdout(io.StringIO()):
        observations.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": [], "rgb": sorted(_IMAGE_KEYS)}})


def _stand_in_for_mujoco_py() -> None:
    if "mujoco_py" in sys.modules or importlib.util.find_spec("mujoco_py") is not None:
        return
    module, builder = ModuleType("mujoco_py"), ModuleType("mujoco_py.builder")
    builder.MujocoException = type("MujocoException", (Exception,), {})  # type: ignore[attr-defined]
    module.builder = builder  # type: ignore[attr-defined]
    sys.modules.update({"mujoco_py": module, "mujoco_py.builder": builder})
