"""Options: defaults, files, pairs, and what a wrong one is told."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from dinov2.config import Config, ConfigError, leaf_names, load_config, parse_config, render_config
from dinov2.config.loader import leaf_values

# Each section holds the one before ten times: 385 bytes that stand for 10 ** 10 values.
BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 11))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_come_without_a_file() -> None:
    assert load_config() == Config()


def test_pairs_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "optim: {epochs: 7, warmup_epochs: 1, base_lr: 1e-3}\ntrain:\n  seed: 3\n")
    config = load_config(path, ["optim.epochs=9", "crops.global_crops_scale=[0.5, 1]"])
    assert (config.optim.epochs, config.optim.base_lr, config.train.seed) == (9, 1e-3, 3)
    assert config.crops.global_crops_scale == (0.5, 1.0)
    assert config.optim.min_lr == Config().optim.min_lr


def test_text_is_taken_as_it_is() -> None:
    dataset = "GroupedJSON:split=TRAIN:root=/data/a b{1}"
    assert load_config(None, [f"train.dataset_path={dataset}"]).train.dataset_path == dataset
    assert load_config(None, ["MODEL.WEIGHTS=out/model_0000009.rank_{rank}.pth"]).MODEL.WEIGHTS.endswith("{rank}.pth")
    assert load_config(None, ["train.output_dir=123"]).train.output_dir == "123"


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("train.sede=1", "unknown option train.sede .*did you mean train.seed"),
        ("batch_size=3", "did you mean .*batch_size"),
        ("nonsense_word=3", "ssl_default_config.yaml lists all"),
        ("optim.epochs=many", "optim.epochs .*expected a whole number, found 'many'"),
        ("optim.epochs=1.5", "expected a whole number"),
        ("optim.epochs=true", "expected a whole number, found True"),
        ("train.cache_dataset=1", "expected true or false"),
        ("optim.epochs=0", "at least 1"),
        ("optim.clip_grad=-1", "at least 0"),
        ("optim.base_lr=.nan", "finite"),
        ("student.drop_path_rate=1.0", "at most 0.99"),
        ("teacher.teacher_temp=0", "greater than 0"),
        ("train.centering=centred", "'centred' is not one of centering, sinkhorn_knopp"),
        ("crops.global_crops_scale=[0.3]", "a list of 2"),
        ("evaluation.nb_knn=[]", "a list, each entry a whole number"),
        ("crops.global_crops_scale=[0.9,0.3]", "the first number must not exceed"),
        ("crops.global_crops_size=225", "225 is not divisible by student.patch_size=16.*224 and 240"),
        ("crops.local_crops_size=[96,100]", "96x100 is not divisible"),
        ("evaluation.image_size=30", "evaluation.image_size=30 is not divisible by student.patch_size=16"),
        ("crops.color_jitter=[0,0,0,0.6]", "hue, the last, must be at most 0.5"),
        ("optim.warmup_epochs=200", "exceeds optim.epochs=100"),
        ("evaluation.train_dataset_path=ELPV:split=TRAIN", "must be given together"),
        ("compute_precision.student.ibot_head.sharding_strategy=NO_SHARD", "both must be sharded, or both replicated"),
        ("train.seed", "expected key=value"),
        ("optim=3", "unknown option optim"),
        ("train.seed=[", "not valid YAML"),
        (
            "train.seed=${train.sed}",
            r"train.seed .*Interpolation key 'train.sed' not found.*a plain \${ is written \\\${",
        ),
        ("train.output_dir=${", r"train.output_dir \(in 'train.output_dir=\${'\)"),
        ("train.output_dir=${train.output_dir}", "Recursive"),
        ("evaluation.nb_knn[9]=3", "out of range"),
        ("train.seed[0]=3", r"train.seed\[0\] .*only entries of a list are named so, by number"),
        ("evaluation.nb_knn[x]=3", r"nb_knn\[x\] .*by number"),
        ("evaluation.nb_knn[0=3", "by number"),
        ("train.seed=2026-01-01", r"expected a whole number, found datetime.date"),
    ],
)
def test_a_wrong_pair_is_explained(pair: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [pair])


@pytest.mark.parametrize(
    ("text", "pairs", "expected"),
    [
        ("", ["train.output_dir=out/${student.arch}_${optim.epochs}"], "out/vit_large_100"),
        ("train: {output_dir: 'out/${student.arch}'}\nstudent: {arch: vit_tiny}", [], "out/vit_tiny"),
        ("train: {output_dir: 'out/${.seed}'}", ["train.seed=5"], "out/5"),
        ("", [r"train.output_dir=a$b/\${c}"], "a$b/${c}"),
        ("train: {output_dir: '$HOME/\\${c}$'}", [], "$HOME/${c}$"),
        ("", [r"train.output_dir=a\\\${b}"], r"a\${b}"),
        ("", ["train.output_dir="], ""),
    ],
)
def test_a_text_may_name_other_options(tmp_path: Path, text: str, pairs: list[str], expected: str) -> None:
    config = load_config(write(tmp_path / "a.yaml", text), pairs)
    assert config.train.output_dir == expected
    assert load_config(write(tmp_path / "b.yaml", render_config(config))) == config


def test_numbers_lists_and_entries_of_lists_may_be_taken_from_other_options(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.yaml", "optim: {min_lr: 1e-06, base_lr: '${optim.min_lr}'}\nevaluation: {nb_knn: [3, 5]}"
    )
    pairs = [
        "crops.local_crops_scale=[0.1,'${crops.global_crops_scale[0]}']",
        "evaluation.nb_knn[1]=${train.num_workers}",
    ]
    config = load_config(path, ["crops.global_crops_scale[0]=0.5", *pairs])
    assert (config.optim.base_lr, config.evaluation.nb_knn) == (1e-6, (3, 10))
    assert (config.crops.global_crops_scale, config.crops.local_crops_scale) == ((0.5, 1.0), (0.1, 0.5))


def test_anchors_and_merge_keys_hold(tmp_path: Path) -> None:
    text = "dino: &head {head_nlayers: 2, head_n_prototypes: 8}\nibot:\n  <<: *head\n  head_n_prototypes: 9\n"
    config = load_config(write(tmp_path / "a.yaml", text))
    assert (config.ibot.head_nlayers, config.ibot.head_n_prototypes, config.dino.head_n_prototypes) == (2, 9, 8)


def test_options_come_from_mappings_and_other_options_too() -> None:
    config = load_config({"train": {"seed": 3, "output_dir": Path("out")}, "optim.epochs": 20}, {"train": {"seed": 4}})
    assert (config.train.seed, config.train.output_dir, config.optim.epochs) == (4, "out", 20)
    assert load_config(config) == config
    assert load_config(load_config(None, [r"train.output_dir=\${a}"]), ["train.seed=1"]).train.output_dir == "${a}"
    with pytest.raises(ConfigError, match=r"unknown option train.sede \(in the arguments\); did you mean train.seed"):
        load_config(None, {"train": {"sede": 4}})


def test_sections_that_contain_themselves_are_refused_in_mappings_too() -> None:
    endless: dict[str, Any] = {}
    endless["train"] = endless
    with pytest.raises(ConfigError, match=r"train\.train\..*contains itself"):
        load_config(endless)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("${%s}", r"MODEL\.WEIGHTS .*: its references \${…} to other options unfold into too much"),
        ("${oc.select:%s}", "unfold into too much"),
        ("${${student.ffn_layer}%s}", None),
        ("${%s[0]}", None),
    ],
)
def test_texts_whose_references_unfold_without_measure_are_refused(reference: str, message: str | None) -> None:
    """Each of some twenty texts would hold the next one ten times."""
    names = [name for name, value in leaf_values(Config()) if type(value) is str]
    assert len(names) > 20
    pairs = [f"{name}={(reference % following) * 10}" for name, following in pairwise(names)]
    with pytest.raises(ConfigError, match=message):
        load_config(None, pairs)


def test_both_losses_off_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is left to learn"):
        load_config(None, ["dino.loss_weight=0", "ibot.loss_weight=0"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crops: {global_crops_scale: &a [0.1, *a]}", r"bad\.yaml, line 1, column 38: .*\*a contains itself"),
        ("train: &a {b: *a}", r"line 1, column 15: .*\*a contains itself"),
        ("train: {seed: " + "[" * 20_000, "line 1, column 77: .*nested more than 64 levels deep"),
        ("\n".join(f"{' ' * depth}a:" for depth in range(500)), "line 64, .*nested more than 64 levels deep"),
        (BOMB, r"line 6, column 25: .*the repetitions of \*a4 unfold into more than 100,000 values"),
        ("train: {seed: " + "1" * 5000 + "}", "bad.yaml: not valid YAML: Exceeds the limit"),
        ("train: {seed: 2026-02-31}", "bad.yaml: not valid YAML: day"),
        ("train: {output_dir: [" + "x, " * 2000 + "]}", r"expected text, found .{300}… \([\d,]+ characters\)$"),
        ("x" * 900 + ": 1", r"unknown option x{300}… \(900 characters\)"),
        ("- a\n- b", r"expected sections with options, .*found a list: \['a', 'b'\]"),
        ("train", "expected sections with options, .*found text: 'train'"),
        ("task: depth\nbackbone: {mode: full}", "unknown option task .*belongs to fine-tuning.*dinov2 finetune"),
        ("head.kind: mlp", "unknown option head.kind .*belongs to fine-tuning"),
        ("train: {seeed: 1}", "train.seeed .*bad.yaml.*did you mean train.seed"),
        ("train: 3", "train .*expected options below it"),
        ("- 1", "expected sections"),
        ("train: {seed: [", r"bad\.yaml, line 1, column 16: not valid YAML: "),
        (
            "train:\n\tseed: 1",
            r"bad\.yaml, line 2, column 1: not valid YAML: found character .*with spaces, not with tabs",
        ),
        ("optim: {epochs: x}", "bad.yaml"),
        (
            "train:\n  seed: 1\n  # merged\n  seed: 2",
            r"bad\.yaml, line 4, column 3: not valid YAML: the key 'seed' is already in line 2 of the same section",
        ),
        ("train: {seed: 1}\noptim: {epochs: 2}\ntrain: {seed: 1}", "line 3, .*the key 'train' is already in line 1"),
        ("train: {seed: 1, 'seed': 1}", "the key 'seed' is already in line 1"),
        ("train: {seed: 1}\ntrain.seed: 2", r"bad\.yaml: train\.seed is given 2 times, with and without dots"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "bad.yaml", text))


def test_merged_sections_may_name_a_key_again(tmp_path: Path) -> None:
    text = "crops: &a {global_crops_size: 64}\ntrain: {<<: {seed: 1}, seed: 2}"
    assert load_config(write(tmp_path / "a.yaml", text)).train.seed == 2
    again = "x: {y: &b {<<: {seed: 1}, seed: 2}}\ntrain: {<<: *b}"  # what is merged twice is still no key twice
    with pytest.raises(ConfigError, match=r"unknown option x\.y\.seed"):
        load_config(write(tmp_path / "b.yaml", again))


def test_repetitions_without_measure_are_refused_in_what_a_model_file_holds_and_in_pairs() -> None:
    with pytest.raises(ConfigError, match=r"best\.pth: config, line 6, .*unfold into more than"):
        parse_config(BOMB, "best.pth: config")
    with pytest.raises(ConfigError, match=r"nested more than 64 levels deep"):
        load_config(None, ["train.seed=" + "[" * 5000])


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    write(tmp_path / "config.yaml", "")
    with pytest.raises(FileNotFoundError, match=r"/confg\.yaml; did you mean .*/config\.yaml\?"):
        load_config(tmp_path / "confg.yaml")
    with pytest.raises(FileNotFoundError, match=r" is a folder, not a config file; it holds config\.yaml$"):
        load_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*/runs either"):
        load_config(tmp_path / "runs" / "config.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"no config file at a\.yaml \(looked for in {tmp_path}\)"):
        load_config("a.yaml")
    with pytest.raises(ConfigError, match=r"expected key=value, found 'a\.yaml'; .* is named by --config a\.yaml"):
        load_config(None, ["a.yaml"])
    (tmp_path / "weights.pth").write_bytes(b"PK\x80\x81")
    with pytest.raises(ConfigError, match=r"weights\.pth is not valid YAML: it is no text in UTF-8 \(byte 0x80 at 2\)"):
        load_config("weights.pth")


def test_an_empty_file_and_an_empty_section_mean_defaults(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_config(write(tmp_path / "a.yaml", "")) == Config()
    assert "a.yaml is empty: every option has its default" in caplog.text
    assert load_config(write(tmp_path / "b.yaml", "train:\n")) == Config()


def test_the_resolved_config_reloads_equal(tmp_path: Path) -> None:
    config = load_config(None, ["optim.base_lr=1e-5", "student.patch_size=[16, 8]", "train.output_dir=a: b # c"])
    (tmp_path / "config.yaml").write_text(render_config(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


def test_the_default_file_shows_every_option_with_its_default_and_meaning(repository: Path) -> None:
    text = (repository / "configs" / "ssl_default_config.yaml").read_text(encoding="utf-8")
    assert text.endswith(render_config(Config(), comments=True))
    shown = yaml.safe_load(text)
    for name in leaf_names():
        value: Any = shown
        for part in name.split("."):
            value = value[part]


def test_every_shipped_config_loads_and_carries_a_header(repository: Path) -> None:
    paths = [repository / "configs" / "ssl_default_config.yaml"]
    paths += sorted(path for kind in ("train", "eval") for path in (repository / "configs" / kind).glob("*.yaml"))
    assert len(paths) >= 12
    for path in paths:
        load_config(path)
        header = path.read_text(encoding="utf-8").split("\n\n")[0]
        assert header.startswith("#"), f"{path} has no header"
        if path.parent.name in ("train", "eval"):
            assert "ommand" in header, f"the header of {path} names no command"


def test_upstream_files_load_unchanged(reference: Any, tmp_path: Path) -> None:
    files = reference("upstream_options.json")
    assert len(files) == 12
    for name, options in files.items():
        config = load_config(options)
        nested: dict[str, Any] = {}
        for key, value in options.items():
            *sections, last = key.split(".")
            place = nested
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
        path = write(tmp_path / "upstream.yaml", yaml.safe_dump(nested))
        assert load_config(path) == config, name
        for key, value in options.items():
            kept: Any = config
            for part in key.split("."):
                kept = getattr(kept, part)
            assert (list(kept) if isinstance(kept, tuple) else kept) == value, (name, key)


def test_shipped_files_of_upstream_names_agree_with_them(reference: Any, repository: Path) -> None:
    for name, options in reference("upstream_options.json").items():
        if name == "ssl_default_config.yaml":
            continue
        config = load_config(repository / "configs" / name)
        for key, value in options.items():
            kept: Any = config
            for part in key.split("."):
                kept = getattr(kept, part)
            assert json.loads(json.dumps(kept)) == value, (name, key)
