"""Builds fastreplay's compiled half. Where there is no compiler the install goes on without it."""

import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def extensions():
    import pybind11

    if sys.platform == "win32":
        flags = ["/std:c++17", "/O2", "/EHsc", "/fp:precise"]
    else:
        # No fused multiply-add: priorities are quantised alike on every processor (priority.h).
        # No trapping arithmetic: lets loops with a choice in them become vector code.
        flags = [
            "-std=c++17",
            "-O3",
            "-ffp-contract=off",
            "-fno-trapping-math",
            "-fvisibility=hidden",
            "-pthread",
        ]
        flags += ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
    return [
        Extension(
            "fastreplay._cpu",
            sources=sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h") + glob("csrc/*.inl")),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=flags,
            language="c++",
            optional=True,
        )
    ]


class BuildExt(build_ext):
    """Says in one line what a failed build means, instead of ending the install."""

    def run(self):
        self.attempt(super().run)

    def build_extension(self, ext):
        self.attempt(super().build_extension, ext)

    def attempt(self, step, *args):
        try:
            step(*args)
        except Exception as error:
            reason = str(error).replace("\n", " ")[:100]
            print(f"fastreplay: not compiled; the scripts run with --buffer numpy. Why: {reason}")


setup(
    packages=["fastreplay"],
    package_dir={"fastreplay": "csrc/fastreplay"},
    package_data={"fastreplay": ["*.pyi", "py.typed"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExt},
)
