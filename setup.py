"""Builds the compiled half of pileus: every ``.pyx`` below ``src`` is one extension module."""

from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

SOURCES = Path("src")
LIBRARIES: dict[str, list[str]] = {  # module name -> shared libraries it links
    "pileus.block._qcow2_compressed": ["z", "zstd"],
}

extensions = [
    Extension(
        name := ".".join(path.relative_to(SOURCES).with_suffix("").parts),
        [str(path)],
        libraries=LIBRARIES.get(name, []),
        extra_compile_args=["-O2", "-g0", "-fno-strict-aliasing", "-Wno-sign-compare"],
        extra_link_args=["-s"],
    )
    for path in sorted(SOURCES.rglob("*.pyx"))
]

setup(
    ext_modules=cythonize(
        extensions,
        include_path=[str(SOURCES)],
        build_dir="build/cython",
        compiler_directives={"language_level": 3, "embedsignature": False, "binding": False},
    )
)
