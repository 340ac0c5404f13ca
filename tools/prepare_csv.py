"""Door: writes the images that a table lists as a grouped set; see ``dinov2.data.prepare.from_csv``."""

from dinov2.data.prepare.from_csv import main
from dinov2.run.launch import exit_with

if __name__ == "__main__":
    exit_with(main)
