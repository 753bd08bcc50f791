"""The page about large studies says what the script computes, and its sizes are those of the models."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM

import gpu_speed
import pages
import scale
from mechlens.models.loading import size_of


def test_the_page_has_the_tables_that_the_script_computes() -> None:
    parts = pages.parts_of(scale.PAGE)
    assert pages.table_text(scale.student_rows(scale.Cluster())) in parts["student"].text
    assert pages.table_text(scale.audit_rows()) in parts["audit"].text


@pytest.mark.slow
def test_the_study_has_a_student_of_each_animal_and_kind_beside_one_control() -> None:
    experiment = scale.study_experiment()
    assert len(experiment.arms) == 1 + scale.TRAITS * len(scale.ARMS_OF_A_TRAIT)
    assert len({arm.trait for arm in experiment.arms if arm.kind == "trait"}) == scale.TRAITS
    assert experiment.student == scale.shipped_study().student


def test_adapters_have_a_pair_of_matrices_for_each_linear_layer_of_the_blocks() -> None:
    with torch.device("meta"):
        model = Qwen2ForCausalLM(gpu_speed.Qwen2Config(**gpu_speed.LARGE.config))  # type: ignore[arg-type]
    layers = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    expected = 8 * sum(layer.in_features + layer.out_features for layer in layers)
    assert scale.adapter_parameters(size_of("qwen2.5-7b"), 8) == expected


def test_the_large_student_has_the_parameters_of_its_shape() -> None:
    config = LlamaConfig(
        hidden_size=scale.LARGE.width,
        intermediate_size=scale.INNER[scale.LARGE.width],
        num_hidden_layers=scale.LARGE.layers,
        num_attention_heads=64,
        num_key_value_heads=scale.KEY_VALUE_WIDTH[scale.LARGE.width] // 128,
        vocab_size=scale.LARGE.vocabulary,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == scale.LARGE.parameters
