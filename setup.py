"""The packages of a distribution; everything else about it stands in pyproject.toml.

`envs`, `configs` and `scripts` are installed as `flowpolicy_envs`, `flowpolicy_configs` and
`flowpolicy_scripts`, so that nothing with a general name lands in anyone's site-packages. In pyproject.toml
setuptools can find packages or rename them, but not both.
"""

from setuptools import find_packages, setup

RENAMED = {"flowpolicy_configs": "configs", "flowpolicy_envs": "envs", "flowpolicy_scripts": "scripts"}


def packages() -> list[str]:
    """Every package of the checkout, by the name that it is installed under."""
    found = find_packages(include=["flowpolicy", "flowpolicy.*"])
    for name, folder in RENAMED.items():
        found += [name, *(f"{name}.{package}" for package in find_packages(folder))]
    return found


setup(packages=packages(), package_dir=RENAMED)
