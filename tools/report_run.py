"""Door: writes what is known of a run into one HTML file that can be read offline."""

from dinov2.eval.report.page import main
from dinov2.run.launch import exit_with

if __name__ == "__main__":
    exit_with(main)
