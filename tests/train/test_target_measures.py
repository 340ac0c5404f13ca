"""Measures of targets against slow definitions; a period's figures against all its batches at once."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.train import target_measures
from dinov2.train.ssl_meta_arch import Predictions, Targets
from dinov2.train.target_measures import TargetMeasures

B, K, M, D = 3, 8, 7, 5
TEMPERATURE = 0.1


def batch(seed: int, *, masked: int = M, sharpness: float = 3.0) -> tuple[Targets, Predictions]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    targets = Targets(
        (sharpness * randn(2, B, K)).softmax(-1), (sharpness * randn(masked, K)).softmax(-1), randn(2 * B, D)
    )
    return targets, Predictions(
        randn(2 * B, K).requires_grad_(), randn(4 * B, K), randn(masked, K).requires_grad_(), randn(2 * B, D)
    )


def entropy(probabilities: Tensor) -> float:
    return -sum(float(p) * math.log(float(p)) for p in probabilities if p > 0)


def slow(targets: Tensor, logits: Tensor) -> dict[str, float]:
    entropies = [entropy(row) for row in targets]
    mean = sum(entropies) / len(entropies)
    divergences = [
        F.kl_div(F.log_softmax(student / TEMPERATURE, dim=-1), teacher, reduction="sum").item()
        for teacher, student in zip(targets, logits, strict=True)
    ]
    return {
        "teacher_entropy": mean / math.log(K),
        "teacher_information": entropy(targets.mean(0)) - mean,
        "kl": sum(divergences) / len(divergences),
    }


def test_a_step_is_measured_as_defined() -> None:
    targets, predictions = batch(0)
    measures = TargetMeasures(TEMPERATURE)
    measures.observe(targets, predictions)
    assert targets.cls is not None
    assert targets.patches is not None
    assert predictions.global_cls is not None
    assert predictions.patches is not None
    # Crop 0 of the student meets crop 1 of the teacher.
    crossed = torch.cat([targets.cls[1], targets.cls[0]])
    expected = {f"{name}_cls": value for name, value in slow(crossed, predictions.global_cls).items()}
    expected |= {f"{name}_patch": value for name, value in slow(targets.patches, predictions.patches).items()}
    pairs = [(i, j) for i in range(B) for j in range(B) if i != j]
    cosines = [torch.cosine_similarity(targets.features[i], targets.features[j], dim=0).item() for i, j in pairs]
    expected["teacher_cosine"] = sum(cosines) / len(cosines)
    centred = targets.features - targets.features.mean(0)
    alike = torch.cosine_similarity(centred[:B, None], centred[None, B:], dim=-1)
    expected["crop_match"] = sum(alike[i].argmax().item() == i for i in range(B)) / B
    assert {name: value.item() for name, value in measures.step.items()} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert not any(value.requires_grad for value in measures.step.values())


@pytest.mark.parametrize(
    ("targets", "entropy_share", "information", "used", "won"),
    [
        (torch.full((K, K), 1 / K), 1.0, 0.0, 1.0, 1 / K),  # uniform
        (torch.eye(K)[[2] * K], 0.0, 0.0, 1 / K, 1 / K),  # one prototype takes all
        (torch.eye(K), 0.0, math.log(K), 1.0, 1.0),  # each image has its own
        (torch.eye(K)[[0, 1] * (K // 2)], 0.0, math.log(2), 2 / K, 2 / K),
    ],
)
def test_known_targets(targets: Tensor, entropy_share: float, information: float, used: float, won: float) -> None:
    measures = TargetMeasures(TEMPERATURE)
    logits = TEMPERATURE * targets.clamp_min(1e-30).log()  # a student that says the same
    measures.observe(Targets(None, targets, torch.ones(2, D)), Predictions(None, None, logits, torch.ones(2, D)))
    step = {name: value.item() for name, value in measures.step.items()}
    assert step == pytest.approx(
        {"teacher_entropy_patch": entropy_share, "teacher_information_patch": information, "kl_patch": 0.0}, abs=1e-5
    )
    assert measures.close_period() == pytest.approx({"prototypes_used_patch": used, "prototypes_won_patch": won})


def test_a_period_counts_all_its_batches_and_then_begins_anew() -> None:
    measures = TargetMeasures(TEMPERATURE)
    batches = [batch(seed) for seed in range(3)]
    for targets, predictions in batches:
        measures.observe(targets, predictions)
    rows = torch.cat([targets.patches for targets, _ in batches if targets.patches is not None])
    figures = measures.close_period()
    assert figures["prototypes_used_patch"] == pytest.approx(math.exp(entropy(rows.mean(0))) / K, rel=1e-5)
    assert figures["prototypes_won_patch"] == len(rows.argmax(-1).unique()) / K
    assert measures.close_period() == {}
    measures.observe(*batches[0])
    again = measures.close_period()
    alone = TargetMeasures(TEMPERATURE)
    alone.observe(*batches[0])
    assert again == alone.close_period()


def test_a_period_goes_on_after_a_resume() -> None:
    whole, first, second = (TargetMeasures(TEMPERATURE) for _ in range(3))
    for measures, seeds in ((whole, (0, 1)), (first, (0,))):
        for seed in seeds:
            measures.observe(*batch(seed))
    second.load_state_dict(first.state_dict())
    second.observe(*batch(1))
    assert second.close_period() == whole.close_period()
    assert second.step.keys() == whole.step.keys()


def counts(measures: TargetMeasures) -> dict[str, Tensor]:
    state = measures.state_dict()
    return {f"{name}_{kind}": tensor.clone() for name in ("used", "won") for kind, tensor in state[name].items()}


def test_a_batch_that_is_taken_back_leaves_no_trace() -> None:
    ours, expected = TargetMeasures(TEMPERATURE), TargetMeasures(TEMPERATURE)
    for seed, kept in enumerate((False, True, False, False, True, True, False)):
        ours.observe(*batch(seed))
        if kept:
            expected.observe(*batch(seed))
        else:
            ours.forget_batch()
            assert not ours.step
        if seed == 3:
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))
            held = [tensor.data_ptr() for tensor in ours.state_dict()["used"].values()]
    assert [tensor.data_ptr() for tensor in ours.state_dict()["used"].values()] == held, "counts are added to in place"
    assert counts(ours).keys() == {"used_cls", "used_patch", "won_cls", "won_patch"}
    for name, tensor in counts(expected).items():
        assert torch.equal(counts(ours)[name], tensor), name
    assert ours.close_period() == expected.close_period()
    ours.forget_batch()
    assert all(not tensor.any() for tensor in counts(ours).values()), "what is counted is not taken back"
    first = TargetMeasures(TEMPERATURE)
    first.observe(*batch(0))
    first.forget_batch()
    assert first.close_period() == {}


def test_what_a_batch_cannot_tell_is_absent() -> None:
    measures = TargetMeasures(TEMPERATURE)
    measures.observe(*batch(0, masked=0))
    assert {name for name in measures.step if "patch" in name} == set()
    assert {name for name in measures.close_period() if "patch" in name} == set()
    one = Targets(torch.full((2, 1, K), 1 / K), None, torch.ones(2, D))
    measures.observe(one, Predictions(torch.zeros(2, K), None, None, torch.ones(2, D)))
    assert not {"teacher_cosine", "crop_match"} & measures.step.keys(), "one image has no other to be compared with"
    assert measures.step["teacher_entropy_cls"].item() == pytest.approx(1)


def test_many_targets_are_sampled_for_entropy_and_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_measures, "MAX_ROWS", 10)
    every_second = torch.cat([torch.full((10, 1, K), 1 / K), torch.eye(K)[[3] * 10][:, None]], dim=1).flatten(0, 1)
    measures = TargetMeasures(TEMPERATURE)
    targets = Targets(None, every_second, torch.ones(2, D))
    measures.observe(targets, Predictions(None, None, torch.zeros(20, K), torch.ones(2, D)))
    assert measures.step["teacher_entropy_patch"].item() == pytest.approx(1), "rows 0, 2, 4, …"
    expected = math.exp(entropy(every_second.mean(0))) / K
    assert measures.close_period()["prototypes_used_patch"] == pytest.approx(expected)


def test_half_precision_logits_are_measured_in_float32() -> None:
    targets, predictions = batch(0)
    assert predictions.global_cls is not None
    halved = Predictions(predictions.global_cls.bfloat16(), None, None, predictions.features)
    measures = TargetMeasures(TEMPERATURE)
    measures.observe(Targets(targets.cls, None, targets.features.bfloat16()), halved)
    assert all(value.dtype == torch.float32 for value in measures.step.values())
