"""Packaging of recbole_hatllm. The bounds below were run; constraints.txt pins the set that CI uses."""

from pathlib import Path

from setuptools import setup

setup(
    name="recbole_hatllm",
    version="0.1.0",
    description="HatLLM and the LLM-based sequential recommenders it is compared with, as RecBole models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    # RecBole 1.2.1 requires ray <= 2.6.3, which has no wheel for Python 3.12.
    python_requires=">=3.10,<3.12",
    packages=[
        "recbole_hatllm",
        "recbole_hatllm.analysis",
        "recbole_hatllm.data",
        "recbole_hatllm.data.sources",
        "recbole_hatllm.model",
        "recbole_hatllm.properties",
    ],
    package_dir={"recbole_hatllm": "recbole_hatllm", "recbole_hatllm.properties": "properties"},
    package_data={
        "recbole_hatllm": ["py.typed", "*.css", "*.js"],
        "recbole_hatllm.properties": ["*.yaml", "*/*.yaml"],
    },
    install_requires=[
        "recbole==1.2.1",
        "torch>=2.5",
        "transformers>=4.53",
        "peft>=0.17",
        "accelerate>=1.0",
        "safetensors>=0.4",
        "gguf>=0.10",
        "filelock>=3",
        "optuna>=4",
        "matplotlib>=3.8",
        "numpy>=1.26",
        # RecBole drops rows silently and reads token sequences wrongly on pandas 3.
        "pandas>=1.5,<3",
        "scikit-learn",
        "pyyaml>=6",
        "tqdm",
        "tensorboard",
    ],
    extras_require={
        "test": ["pytest", "hypothesis", "ruff", "mypy", "sentencepiece", "pyarrow", "types-PyYAML", "types-tqdm"],
        "parquet": ["pyarrow"],
        "4bit": ["bitsandbytes"],
    },
    entry_points={"console_scripts": ["recbole-hatllm=recbole_hatllm.cli:main"]},
)
