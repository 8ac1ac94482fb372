"""Builds the compiled modules of fastreplay. An install without a compiler leaves them out.

The environment variable FASTREPLAY_CUDA: "auto" (the default) builds the CUDA module if nvcc is
found, "1" aborts the install if that fails, "0" does not try. FASTREPLAY_CUDA_ARCHITECTURES="80 90"
compiles it for these GPUs alone (compute capabilities 8.0 and 9.0), which takes less time.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# And PTX of the last one, which newer GPUs compile at first use.
CHOSEN = os.environ.get("FASTREPLAY_CUDA_ARCHITECTURES", "").split()
ARCHITECTURES = CHOSEN or ["75", "80", "90", "100"]  # those of them that nvcc knows
WANTED = os.environ.get("FASTREPLAY_CUDA", "auto")


def flags():
    if sys.platform == "win32":
        return ["/std:c++17", "/O2", "/EHsc", "/fp:precise"]
    # No fused multiply-add: every processor quantises priorities to the same bits (priority.h).
    # No trapping arithmetic: compilers vectorize loops with a conditional.
    # CXXFLAGS may set other levels of optimization and debug information (tests/sanitize.sh does).
    levels = [flag for flag in ("-O3", "-g0") if flag[:2] not in os.environ.get("CXXFLAGS", "")]
    return [
        *("-std=c++17", *levels, "-ffp-contract=off", "-fno-trapping-math"),
        *("-fvisibility=hidden", "-pthread", "-Wall", "-Wextra", "-Wno-maybe-uninitialized"),
        "-Wno-unknown-warning-option",
    ]


def find_nvcc():
    """The path of nvcc, or None if there is none or FASTREPLAY_CUDA is 0."""
    if WANTED == "0" or sys.platform == "win32":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    names = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes if home)]
    names += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in map(shutil.which, filter(None, names)) if path), None)


def extensions(nvcc):
    import pybind11
    from pybind11.setup_helpers import ParallelCompile

    ParallelCompile().install()  # one source file per core
    common = {"include_dirs": ["csrc", pybind11.get_include()], "extra_compile_args": flags()}
    common |= {"language": "c++", "optional": True}
    headers = glob("csrc/*/*.h") + glob("csrc/*/*.inl") + glob("csrc/*/*.cuh")
    python = ["csrc/python/tensor_view.cpp"]
    built = [
        Extension(
            "fastreplay._cpu",
            sources=sorted([*glob("csrc/cpu/*.cpp"), "csrc/python/cpu_bindings.cpp", *python]),
            depends=sorted(headers),
            **common,
        )
    ]
    if nvcc:
        sources = [*glob("csrc/cuda/*.cu"), "csrc/python/cuda_bindings.cpp", *python]
        sources += glob("csrc/cpu/tile_*.cpp")
        sources += ["csrc/cpu/huge_pages.cpp", "csrc/cpu/instructions.cpp"]
        built.append(
            Extension(
                "fastreplay._cuda", sources=sorted(sources), depends=sorted(headers), **common
            )
        )
    return built


def run_nvcc(*arguments):
    """Runs nvcc. Returns its output; raises RuntimeError with it if nvcc fails."""
    result = subprocess.run(arguments, capture_output=True, text=True)
    output = result.stdout + result.stderr
    if result.returncode != 0:
        raise RuntimeError(f"nvcc: {output.strip()}")
    return output


class BuildExt(build_ext):
    """Compiles the .cu sources, and reports the consequence of a failed build in one line."""

    nvcc = find_nvcc()

    def run(self):
        self.attempt(super().run, "")

    def build_extension(self, ext):
        is_cuda = ext.name.endswith("_cuda")
        self.attempt(self.build_cuda if is_cuda else super().build_extension, ext.name, ext)

    def build_cuda(self, ext):
        # The folders of nvcc's headers and libraries, from a dry run.
        plan = run_nvcc(self.nvcc, "--dryrun", "empty.cu")
        settings = dict(re.findall(r"^#\$ (INCLUDES|LIBRARIES)=(.*)$", plan, re.MULTILINE))
        folders = {key: shlex.split(value) for key, value in settings.items()}
        ext.include_dirs += [folder[2:] for folder in folders["INCLUDES"]]
        ext.library_dirs += [folder[2:] for folder in folders["LIBRARIES"] if folder[:2] == "-L"]
        # The runtime is linked statically: the module loads without a driver, and with any torch.
        ext.libraries += ["cudart_static", "dl", "rt"]

        known = run_nvcc(self.nvcc, "--list-gpu-arch").split()
        targets = [a for a in ARCHITECTURES if f"compute_{a}" in known]
        missing = [a for a in ARCHITECTURES if a not in targets]
        if missing and (CHOSEN or not targets):
            raise RuntimeError(f"this nvcc does not support sm_{', sm_'.join(missing)}")
        command = [self.nvcc, "-std=c++17", "-O3", "-fmad=false", "--threads", "0", "-Icsrc"]
        for target in targets:
            command += ["-gencode", f"arch=compute_{target},code=sm_{target}"]
        command += ["-gencode", f"arch=compute_{targets[-1]},code=compute_{targets[-1]}"]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"]

        def compiled(source):
            to = Path(self.build_temp) / f"{source}.o"
            to.parent.mkdir(parents=True, exist_ok=True)
            run_nvcc(*command, "-c", source, "-o", str(to))
            return str(to)

        with ThreadPoolExecutor(os.cpu_count()) as jobs:
            kernels = [source for source in ext.sources if source.endswith(".cu")]
            ext.extra_objects += jobs.map(compiled, kernels)
        ext.depends = [*ext.depends, *ext.extra_objects]  # relinks when an object has changed
        ext.sources = [source for source in ext.sources if not source.endswith(".cu")]
        super().build_extension(ext)

    def attempt(self, step, name, *args):
        try:
            step(*args)
        except Exception as error:
            if name.endswith("_cuda") and WANTED == "1":
                sys.exit(f"fastreplay: FASTREPLAY_CUDA=1, but the CUDA build failed: {error}")
            reason = str(error).replace("\n", " ")[:300]
            lost = "--buffer numpy"
            if name.endswith("_cuda"):
                lost = "--buffer cpp; the rest is compiled (FASTREPLAY_CUDA=0 does not try)"
            print(
                f"fastreplay: not compiled{' for CUDA' * name.endswith('_cuda')}; "
                f"the scripts run with {lost}. Why: {reason}"
            )


if WANTED not in ("0", "1", "auto"):
    sys.exit(f"FASTREPLAY_CUDA must be 0, 1 or auto, not {WANTED}")
if WANTED == "1" and not BuildExt.nvcc:
    sys.exit(
        "FASTREPLAY_CUDA=1, but there is no nvcc: install the CUDA toolkit, or set CUDA_HOME to it"
    )

setup(
    packages=["fastreplay"],
    package_dir={"fastreplay": "csrc/fastreplay"},
    package_data={"fastreplay": ["*.pyi", "py.typed"]},
    ext_modules=extensions(BuildExt.nvcc),
    cmdclass={"build_ext": BuildExt},
)
