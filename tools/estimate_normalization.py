"""Door: mean and deviation of a set's channels, beside those that networks of this project expect."""

from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from dinov2.config.command_line import option, parse
from dinov2.data.channel_statistics import estimate_normalization
from dinov2.data.loaders import make_dataset
from dinov2.data.preprocessing import Chain
from dinov2.data.transforms import channel_statistics
from dinov2.run.launch import exit_with


@dataclass(frozen=True)
class NormalizationOptions:
    """Options of the command."""

    dataset: str = option(help="images, as a dataset string")
    preprocessing: Path | None = option(None, help="YAML file with steps, see docs/preprocessing.md")
    num_images: int = option(500, help="images to look at, evenly spread over the set")


def main() -> int:
    """Prints YAML: mean and std per channel, from 0 to 1."""
    options = parse(
        NormalizationOptions,
        description="Estimates mean and standard deviation per channel of a set, after preprocessing.",
        example="python tools/estimate_normalization.py --dataset ImageFolder:root=raw:labels=none",
    )
    chain = Chain() if options.preprocessing is None else Chain.read(options.preprocessing)
    dataset = make_dataset(dataset_str=options.dataset, preprocessing=chain)
    found = {key: list(value) if isinstance(value, tuple) else value for key, value in
             asdict(estimate_normalization(dataset, options.num_images)).items()}  # fmt: skip
    mean, std = channel_statistics(chain.num_channels)
    expected = {"expected_mean": list(mean), "expected_std": list(std)}
    print(yaml.safe_dump({**found, **expected}, sort_keys=False).strip())
    return 0


if __name__ == "__main__":
    exit_with(main)
