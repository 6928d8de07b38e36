"""Builds `bdkernels._native` where there is a C++ compiler. Without one the install succeeds, on the reference backend.

`pip install .`, or `python setup.py build_ext --inplace` in a checkout. torch is not needed to build.
"""

from __future__ import annotations

import platform
from glob import glob

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
}

SOURCES = ["bindings/module.cpp", "cpu/ops.cpp", "cpu/parallel.cpp", "cpu/rows_baseline.cpp"]
if X86_64:
    SOURCES += ["cpu/rows_avx2.cpp", "cpu/rows_avx512.cpp"]


class BuildNative(build_ext):
    """Compiles each file with flags of its own; a failure is reported, not raised, as the extension is optional."""

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler._compile

        def with_file_flags(
            obj: str, src: str, ext: str, cc_args: list[str], postargs: list[str], pp: list[str]
        ) -> None:
            extra = next((flags for name, flags in FILE_FLAGS.items() if src.endswith(name)), [])
            compile_one(obj, src, ext, cc_args, postargs + extra, pp)

        self.compiler._compile = with_file_flags
        try:
            super().build_extension(ext)
        except Exception as error:
            print(f"bdkernels._native was not built: bdkernels will run on its reference backend in torch ({error})")
        finally:
            self.compiler._compile = compile_one


setup(
    packages=[*find_packages(include=["bdkernels*"]), *find_packages("python")],
    package_dir={"bdengine": "python/bdengine"},
    package_data={"bdengine": ["assets/**/*"]},
    ext_modules=[
        Extension(
            "bdkernels._native",
            [f"csrc/{source}" for source in SOURCES],
            include_dirs=["csrc", "csrc/include", get_include()],
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
            extra_compile_args=FLAGS,
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
