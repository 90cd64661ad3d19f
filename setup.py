from setuptools import find_packages, setup

setup(
    name="framer-toolkit",
    version="0.1.0",
    description="LoRA fine-tuning of Framer, a first-and-last-frame video interpolation model, to a domain",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["toolkit", "toolkit.*"]),
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8,<0.20",
        "diffusers>=0.42,<0.43",
        "transformers>=5",
        "peft>=0.21",
        "webdataset>=1.0",
        "av>=17,<19; python_version < '3.12'",
        "av>=17; python_version >= '3.12'",
        "safetensors",
        "pydantic>=2",
        "pyyaml",
        "numpy",
        "pillow",
        "fire",
        "tqdm",
        "tensorboard",
    ],
    extras_require={
        "gpu": ["xformers>=0.0.35"],
        "autopilot": ["scikit-image"],
        "remote": ["fsspec", "aiohttp", "s3fs"],
        "dev": ["pytest", "hypothesis", "ruff", "mypy", "types-PyYAML", "scikit-image", "aiohttp"],
    },
)
