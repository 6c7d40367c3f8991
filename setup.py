"""Map the folders `passes/` and `kernels/` to packages below `sparse_compile`.

Everything else is declared in pyproject.toml. Only this mapping needs code: setuptools can either search for
packages or take a `package-dir`, and a list of packages by hand would silently leave a new folder out of the wheel.
"""

from setuptools import find_packages, setup

PACKAGE_DIR = {
    "sparse_compile": "sparse_compile",
    "sparse_compile.passes": "passes",
    "sparse_compile.kernels": "kernels",
}

setup(
    package_dir=PACKAGE_DIR,
    packages=[
        name
        for package, folder in PACKAGE_DIR.items()
        for name in (package, *(f"{package}.{sub}" for sub in find_packages(folder)))
    ],
)
