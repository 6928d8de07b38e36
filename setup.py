"""Builds `bdkernels._native` where there is a C++ compiler, and `bdkernels._cuda` where there is nvcc as well.

Without them the install succeeds, on the reference backend. `pip install .`, or `python setup.py build_ext --inplace` in
a checkout. Neither torch nor a GPU is needed to build.

``BDK_CUDA_ARCHS="80;90"`` builds for these compute capabilities alone, ``BDK_CUDA=0`` leaves CUDA out. nvcc is looked for
on PATH, in ``CUDA_HOME``, ``CUDA_PATH`` and /usr/local/cuda, and among what pip has installed (nvidia-cuda-nvcc with
nvidia-cuda-runtime, and nvidia-nvvm and nvidia-cuda-crt of the same version), which pip's build isolation leaves in sight.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from glob import glob
from pathlib import Path

from pybind11 import get_include
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

X86_64 = platform.machine().lower() in ("x86_64", "amd64")

# Arithmetic is unfused so that every backend makes the same bits. -Wno-psabi: vectors never cross a call.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
]
# GCC 12 takes _mm512_undefined() of its own header for a mistake.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# The rows gain 10-20 % from scheduling before register allocation, which is off by default on x86-64.
FILE_FLAGS = {
    "rows_baseline.cpp": ["-fschedule-insns"],
    "rows_avx2.cpp": ["-fschedule-insns", "-mavx2", "-mf16c", "-mfma"],
    "rows_avx512.cpp": ["-fschedule-insns", *AVX512],
    "conv_avx2.cpp": ["-mavx2", "-mfma"],
    "conv_avx512.cpp": AVX512,
}

SOURCES = ["bindings/module.cpp", "cpu/ops.cpp", "cpu/parallel.cpp", "cpu/rows_baseline.cpp", "cpu/conv_baseline.cpp"]
if X86_64:
    SOURCES += [f"cpu/{name}_{isa}.cpp" for name in ("rows", "conv") for isa in ("avx2", "avx512")]


# Unfused, correctly rounded, subnormals kept: the bits of every other backend.
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "-prec-div=true",
    "-prec-sqrt=true",
    "-ftz=false",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "--threads=0",
]
CUDA_SOURCES = ["cuda/step.cu", "cuda/training.cu", "cuda/runtime.cpp"]
# T4; A100; A10 and RTX 30; L4 and RTX 40; H100; B200; RTX 50. Newer devices compile the PTX of the last.
CUDA_ARCHS = ["75", "80", "86", "89", "90", "100", "120"]


def find_nvcc() -> str | None:
    """nvcc on PATH, of a CUDA toolkit or of the pip package nvidia-cuda-nvcc; None where absent or not wanted."""
    if os.environ.get("BDK_CUDA") == "0":
        return None
    places = [os.environ.get("PATH", os.defpath)]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places += [str(Path(home, "bin")) for home in homes if home]
    places += glob(str(Path(sysconfig.get_path("purelib"), "nvidia", "cu*", "bin")))
    return shutil.which("nvcc", path=os.pathsep.join(places))


def gencode(nvcc: str) -> list[str]:
    """nvcc's words for machine code of each arch that is wanted, and PTX of the newest for devices after it."""
    if chosen := os.environ.get("BDK_CUDA_ARCHS"):
        numbers = sorted(chosen.split(";"), key=int)
    else:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
        numbers = [n for n in CUDA_ARCHS if f"sm_{n}" in known]  # CUDA 12.0 ends at 90
    machine = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    return [*machine, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]


def cuda_library_dirs(nvcc: str) -> list[str]:
    """Where ``libcudart_static.a`` is: in nvcc's own words, as on PATH there may be a wrapper only, or beside pip's nvcc."""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True).stderr
    return [*re.findall(r'"-L([^"]+)"', said), str(Path(nvcc).parent.parent / "lib")]


class BuildNative(build_ext):
    """Compiles each file with flags of its own; a failure is reported, not raised, as the extensions are optional."""

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler._compile

        def with_file_flags(
            obj: str, src: str, ext: str, cc_args: list[str], postargs: list[str], pp: list[str]
        ) -> None:
            extra = next((flags for name, flags in FILE_FLAGS.items() if src.endswith(name)), [])
            compile_one(obj, src, ext, cc_args, postargs + extra, pp)

        self.compiler._compile = with_file_flags
        try:
            if ext is CUDA:
                ext.extra_objects = self.compile_kernels(NVCC)
                ext.library_dirs = cuda_library_dirs(NVCC)
            super().build_extension(ext)
        except Exception as error:
            print(f"{ext.name} was not built: bdkernels will run without it ({error})")
        finally:
            self.compiler._compile = compile_one

    def compile_kernels(self, nvcc: str) -> list[str]:
        """The objects that nvcc makes; pybind11 is left to the C++ compiler, or it would be read once an arch."""
        archs = gencode(nvcc)
        objects = []
        for source in CUDA_SOURCES:
            made = Path(self.build_temp, "csrc", source).with_suffix(".o")
            made.parent.mkdir(parents=True, exist_ok=True)
            include = ["-I", "csrc", "-I", "csrc/include"]
            subprocess.run([nvcc, *NVCC_FLAGS, *archs, *include, "-c", f"csrc/{source}", "-o", made], check=True)
            objects.append(str(made))
        return objects


HEADERS = [file for pattern in ("*.h", "*.cuh") for file in sorted(glob(f"csrc/**/{pattern}", recursive=True))]
INCLUDE = ["csrc", "csrc/include", get_include()]

NATIVE = Extension(
    "bdkernels._native",
    [f"csrc/{source}" for source in SOURCES],
    include_dirs=INCLUDE,
    depends=HEADERS,
    extra_compile_args=FLAGS,
    language="c++",
    optional=True,
)
NVCC = find_nvcc()
CUDA = NVCC and Extension(
    "bdkernels._cuda",
    ["csrc/bindings/cuda_module.cpp"],
    include_dirs=INCLUDE,
    libraries=["cudart_static", "dl", "pthread", "rt"],
    depends=[*HEADERS, *(f"csrc/{source}" for source in CUDA_SOURCES)],
    extra_compile_args=FLAGS,
    language="c++",
    optional=True,
)

setup(
    packages=[*find_packages(include=["bdkernels*"]), *find_packages("python")],
    package_dir={"bdengine": "python/bdengine"},
    package_data={"bdengine": ["assets/**/*"]},
    ext_modules=[NATIVE, CUDA] if CUDA else [NATIVE],
    cmdclass={"build_ext": BuildNative},
)
