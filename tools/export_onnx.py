"""Door: a trained model as a verified ONNX file."""

import functools
import sys

from dinov2.deploy.export import main
from dinov2.run.launch import exit_with

if __name__ == "__main__":
    exit_with(functools.partial(main, [*sys.argv[1:], "--to", "onnx"]))
