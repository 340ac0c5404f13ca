"""Door: a backbone with fewer heads, hidden units or blocks."""

from dinov2.deploy.prune import main
from dinov2.run.launch import exit_with

if __name__ == "__main__":
    exit_with(main)
