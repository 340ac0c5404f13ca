"""Deformable attention: against transformers with the same weights, and reading that survives what diverges."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMultiscaleDeformableAttention

from dinov2.layers.deformable_attention import DeformableAttention, sample_maps

SIZES = [(6, 9), (3, 4), (1, 2)]


def test_values_and_gradients_are_those_of_transformers() -> None:
    torch.manual_seed(0)
    ours = DeformableAttention(16, num_levels=3, num_heads=4, num_points=2)
    facts = SimpleNamespace(d_model=16, num_feature_levels=3, disable_custom_kernels=True)
    theirs = DeformableDetrMultiscaleDeformableAttention(facts, num_heads=4, n_points=2)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    theirs.load_state_dict(ours.state_dict())
    memory = torch.randn(2, sum(rows * columns for rows, columns in SIZES), 16)
    queries, boxes = torch.randn(2, 7, 16), 1.4 * torch.rand(2, 7, 4) - 0.2  # some outside of the image
    boxes[:, 0, :2], boxes[:, 0, 2:] = torch.tensor([4.5 / 9, 2.5 / 6]), 0  # exactly on a pixel
    results = []
    for attention in (ours, theirs):
        given = [entry.clone().requires_grad_() for entry in (queries, boxes, memory)]
        if attention is ours:
            output = ours(*given, SIZES)
        else:
            output, _ = theirs(
                hidden_states=given[0],
                encoder_hidden_states=given[2],
                reference_points=given[1][:, :, None].expand(-1, -1, 3, -1),
                spatial_shapes=torch.tensor(SIZES),
                spatial_shapes_list=SIZES,
            )
        gradients = torch.autograd.grad(output.square().sum(), [*given, *attention.parameters()])
        results.append([output, *gradients])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_places_that_are_no_numbers_give_no_error_but_no_number() -> None:
    values, places = torch.randn(1, 6, 2, 4), torch.full((1, 3, 2, 1, 2, 2), 0.5)
    places[0, 0], places[0, 1] = torch.nan, 1e30
    read = sample_maps(values, [(2, 3)], places, torch.ones(1, 3, 2, 1, 2))
    assert read[0, 0].isnan().all()
    assert not read[0, 1].any()
    torch.testing.assert_close(read[0, 2], (values[0, 1] + values[0, 4]).flatten())  # amid the column in the middle


def test_heads_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="8 heads do not divide 12 channels"):
        DeformableAttention(12, num_levels=1)
