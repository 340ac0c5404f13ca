"""Door: serves a model over HTTP."""

from dinov2.deploy.serve import main
from dinov2.run.launch import exit_with

if __name__ == "__main__":
    exit_with(main)
