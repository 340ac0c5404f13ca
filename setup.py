"""Packaging of ``dinov2``: the library of a DINOv2 pretraining fork for industrial images."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

REQUIREMENTS = [
    "torch>=2.10",
    "torchvision>=0.25",
    "numpy>=1.26",
    "pillow>=10.3",
    "opencv-python-headless>=4.9",
    "omegaconf>=2.3",
    "pyyaml>=6.0",
    "fvcore>=0.1.5.post20221221",
    "iopath>=0.1.10",
    "scikit-learn>=1.4",
    "scipy>=1.11",
    "faster-coco-eval>=1.6.5",
    "scikit-image>=0.26",
    "tifffile>=2024.1",
    "matplotlib>=3.8",
    "psutil>=5.9",
    "tensorboard>=2.16",
    "safetensors>=0.8",
    "torchmetrics>=1.6",
    "jinja2>=3.1",
    "markupsafe>=2.1",
    "tqdm>=4.66",
]

SERVE = [
    "fastapi>=0.115",
    "paho-mqtt>=2.1",
    "prometheus-client>=0.20",
    "python-multipart>=0.0.18",
    "uvicorn>=0.30",
]

ONNX = ["onnx>=1.18", "onnxruntime>=1.20", "onnxscript>=0.5"]

EXTRAS = {
    "dev": [
        *SERVE,
        "av>=17.1",
        "elpv-dataset>=1.0",
        "mypy>=1.11",
        *ONNX,
        "openvino>=2025.0",
        "playwright>=1.45",
        "pycocotools>=2.0.8",
        "pydicom>=3.0",
        "pytest>=8.2",
        "pytest-xdist>=3.6",
        "ruff>=0.6",
        "submitit>=1.5.4",
        "tensorrt-rtx>=1.4",
        "timm>=1.0.16",
        "transformers>=4.48",
        "types-PyYAML",
        "types-psutil",
    ],
    "dicom": ["pydicom>=3.0"],
    "demo": ["elpv-dataset>=1.0"],
    "slurm": ["submitit>=1.5.4"],
    "video": ["av>=17.1"],
    "xformers": ["xformers>=0.0.35"],
    # Named now so that instructions stay valid; each is filled when the code that needs it lands.
    "deploy": [*ONNX, "openvino>=2025.0"],
    "tensorrt": [*ONNX, "tensorrt>=10.6"],
    "serve": SERVE,
    "inspect": [],
}

setup(
    name="dinov2",
    version="0.1.0",
    description="DINOv2 self-supervised pretraining for industrial images, grouped by part",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dinov2", "dinov2.*"]),
    package_data={
        "dinov2": ["py.typed"],
        "dinov2.deploy": ["page.html"],
        "dinov2.eval.report": ["template.html", "style.css"],
    },
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["dinov2=dinov2.__main__:main"]},
)
