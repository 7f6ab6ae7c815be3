"""Packs csrc/ into the package, and the compiled operations themselves where torch and a compiler are at hand.

pip's isolated builds have no torch: the operations are then built at first use. Ahead of time:
``pip wheel --no-build-isolation --no-deps .`` (CPU; CUDA too where nvcc is found). ``MIXKV_BUILD=0`` leaves them out,
``MIXKV_BUILD=1`` makes it an error that they cannot be built.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def build_module():
    """mixkv/ops/build.py by itself: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("mixkv_build", ROOT / "mixkv" / "ops" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def wanted(builder) -> bool:
    """Whether the operations are to be compiled now."""
    wish = os.environ.get("MIXKV_BUILD", "auto")
    possible = importlib.util.find_spec("torch") is not None and builder.compiler() is not None
    return wish == "1" or (wish != "0" and possible)


class BuildPackage(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "mixkv"
        shutil.copytree(ROOT / "csrc", package / "csrc", dirs_exist_ok=True)
        builder = build_module()
        if not wanted(builder):
            return
        try:
            builder.build(package / "_native", cuda=builder.compiler("cuda") is not None)
        except builder.BuildError as error:
            if os.environ.get("MIXKV_BUILD") == "1":
                raise
            print(f"mixkv: the compiled operations are left to be built at first use: {error}", file=sys.stderr)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python 3; for this platform only where it holds compiled operations."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = not wanted(build_module())

    def get_tag(self):
        return ("py3", "none", "any" if self.root_is_pure else super().get_tag()[2])


setup(cmdclass={"build_py": BuildPackage, "bdist_wheel": PlatformWheel})
