"""Door: writes a backbone in the layout of another library."""

from dinov2.deploy.export import main
from dinov2.run.launch import exit_with

if __name__ == "__main__":
    exit_with(main)
