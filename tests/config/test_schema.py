"""Options that were changed and do nothing are named, with the reason."""

from pathlib import Path

import pytest

from dinov2.config import Config, load_config, options_without_effect


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        (["ibot.head_n_prototypes=7"], "ibot.head_n_prototypes has no effect while ibot.separate_head is false"),
        (
            ["ibot.loss_weight=0", "ibot.separate_head=true", "ibot.head_nlayers=2"],
            "ibot.separate_head, ibot.head_nlayers have no effect while ibot.loss_weight is 0.0",
        ),
        (
            ["dino.koleo_loss_weight=0", "dino.koleo_all_ranks=true"],
            "dino.koleo_all_ranks has no effect while dino.koleo_loss_weight is 0.0",
        ),
        (
            ["train.cache_dataset=false", "data.cache_gib=1"],
            "data.cache_gib has no effect while train.cache_dataset is false",
        ),
        (["optim.lr=0.5", "optim.base_lr=1"], "optim.base_lr has no effect while optim.lr is 0.5 and not scaled"),
        (["crops.local_crops_number=0", "crops.local_crops_size=48"], "crops.local_crops_size has no effect while "),
        (
            ["dino.loss_weight=0", "ibot.separate_head=true", "dino.head_n_prototypes=9"],
            "dino.head_n_prototypes has no effect while dino.loss_weight is 0.0 and patches have a head of their own",
        ),
        (["evaluation.nb_knn=[3]"], "evaluation.nb_knn has no effect while evaluation.train_dataset_path is empty"),
    ],
)
def test_what_does_nothing_is_named_once_with_the_reason(pairs: list[str], sentence: str) -> None:
    (found,) = options_without_effect(load_config(None, pairs))
    assert found.startswith(sentence)


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        ["ibot.separate_head=true", "ibot.head_n_prototypes=7"],
        ["dino.loss_weight=0", "dino.head_n_prototypes=9"],  # the shared head serves patches
        ["ibot.loss_weight=0"],
        ["optim.base_lr=1"],
    ],
)
def test_nothing_is_said_of_options_that_count(pairs: list[str]) -> None:
    assert options_without_effect(load_config(None, pairs)) == []


def test_no_shipped_config_holds_an_idle_option(repository: Path) -> None:
    assert options_without_effect(Config()) == []
    for path in sorted((repository / "configs" / "train").glob("*.yaml")):
        assert options_without_effect(load_config(path)) == [], path
