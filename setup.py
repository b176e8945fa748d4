"""Maps the root folders to sub-packages: `export/` is `quantempo.export`, and so on."""

from setuptools import find_packages, setup

FOLDERS = ("export", "calib", "engines", "runtime")
inner = find_packages(include=[pattern for name in FOLDERS for pattern in (name, f"{name}.*")])

setup(
    packages=find_packages(include=["quantempo", "quantempo.*"]) + [f"quantempo.{name}" for name in inner],
    package_dir={"quantempo": "quantempo", **{f"quantempo.{name}": name for name in FOLDERS}},
)
