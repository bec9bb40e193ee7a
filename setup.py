"""Metadata, dependencies and the `hope` command. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "hope_megatron/__init__.py").read_text(), re.MULTILINE).group(1)

# configs/ lies at the top of the repository, where people look for it; a wheel carries it inside the package.
CONFIGS = {
    ".".join(["hope_megatron", *folder.relative_to(HERE).parts]): str(folder.relative_to(HERE))
    for folder in [HERE / "configs", *sorted((HERE / "configs").iterdir())]
    if folder.is_dir()
}

# Other places and formats that text can come in; each is asked for by name when it is missing.
DATA = ["fsspec>=2024.2", "pyarrow>=15", "backports.zstd>=1,<2; python_version < '3.14'"]

# Text and shards in web servers and object stores.
REMOTE = ["fsspec>=2024.2", "aiohttp>=3.9,<4", "s3fs>=2024.2"]
GCS = ["gcsfs>=2024.2"]  # Google's store, with Google's many packages

# Public benchmarks: `hope eval lm`.
EVAL = ["lm-eval>=0.4.9,<0.5"]

# A tokenizer.json of Hugging Face: `hope data prepare --tokenizer tokenizer.json`.
HF = ["tokenizers>=0.20,<1"]

# `hope serve`: OpenAI's interface over HTTP.
SERVE = [
    "fastapi>=0.115,<1",
    "jinja2>=3.1,<4",
    "prometheus_client>=0.20,<1",
    "transformers>=4.53,<6",
    "uvicorn>=0.30,<1",
]

# Trackers beside MLflow: `tracking.sinks`.
WANDB = ["wandb>=0.19,<1"]
TENSORBOARD = ["tensorboard>=2.16,<3"]

TEST = [
    *DATA,
    *REMOTE,
    *EVAL,
    *HF,
    *SERVE,
    *WANDB,
    *TENSORBOARD,
    "accelerate>=1.1,<2",
    "httpx2>=2.12,<3",
    "hypothesis>=6.100,<7",
    "import-linter>=2.1,<3",
    "moto[s3]>=5.1,<6",
    "openai>=1.60,<4",
    "peft>=0.15,<1",
    "pytest>=8,<10",
    "pytest-timeout>=2.3,<3",
    "pytest-xdist>=3.6,<4",
    "transformers>=4.53,<6",
    "trl>=0.20,!=1.15.*,<2",
]

setup(
    name="hope_megatron",
    version=VERSION,
    description="Distributed pretraining of HOPE (Nested Learning) on Megatron-Core and DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["hope_megatron*", "data_pipeline*", "launch*"]), *CONFIGS],
    package_dir=CONFIGS,
    package_data={
        **{package: ["*.yaml"] for package in CONFIGS},
        "": ["py.typed", "*.md", "*.json", "*.sh", "*.cpp", "*.h", "templates/*"],
    },
    install_requires=[
        "torch>=2.11,<2.16",
        "megatron-core>=0.16.1,<0.20",  # 0.17 and newer ask for Python 3.12
        "deepspeed>=0.19,<0.20",
        "matplotlib>=3.8,<4",
        "mlflow>=3.17,<4",
        "numpy>=1.26,<3",
        "packaging>=23",
        "protobuf>=4.25,<8",
        "pydantic>=2.10,<3",
        "PyYAML>=6,<7",
        "rich>=13,<16",
        "safetensors>=0.5,<1",
        "scipy>=1.11,<2",
        "sentencepiece>=0.2,<0.3",
        # A wheel of its own: a CPU build of torch is not disturbed. CUDA builds of torch bring theirs.
        'triton>=3.6,<3.10; platform_system == "Linux" and platform_machine == "x86_64"',
        "webdataset>=1.0,<2",
    ],
    extras_require={
        "data": DATA,
        "remote": REMOTE,
        "gcs": GCS,
        "test": TEST,
        "dev": [*TEST, "mypy>=1.13,<3", "pip-audit>=2.9,<3", "pre-commit>=4,<5", "ruff>=0.9,<1", "types-PyYAML"],
        "eval": EVAL,
        "hf": HF,
        "serve": SERVE,
        "transformers": ["transformers>=4.53,<6"],
        "wandb": WANDB,
        "tensorboard": TENSORBOARD,
    },
    entry_points={"console_scripts": ["hope = hope_megatron.cli.main:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
