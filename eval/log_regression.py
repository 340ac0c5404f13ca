"""Door: logistic regression on the features of a frozen backbone."""

from dinov2.eval.log_regression import main
from dinov2.run.launch import exit_with

if __name__ == "__main__":
    exit_with(main)
