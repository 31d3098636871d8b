"""The parts of every family's models are found by structure, not by a list of names."""

import pytest
import torch
import transformers

from qft.lean.model_parts import head_names, layer_stacks, writes_text

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "vocab_size": 100}  # fmt: skip
LLAMA = ("LlamaConfig", {**SIZES, "num_key_value_heads": 2})
BERT = ("BertConfig", SIZES)
T5 = ("T5Config", {"d_model": 64, "num_layers": 2})
BART = ("BartConfig", {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2})
GPT2 = ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4})


@pytest.mark.parametrize(
    ("kind", "config", "heads", "stacks"),
    [
        ("LlamaForCausalLM", LLAMA, [], ["model.layers"]),
        ("LlamaForSequenceClassification", LLAMA, ["score"], ["model.layers"]),
        ("LlamaForQuestionAnswering", LLAMA, ["qa_outputs"], ["transformer.layers"]),
        ("GPT2LMHeadModel", GPT2, [], ["transformer.h"]),
        ("BertForSequenceClassification", BERT, ["classifier"], ["bert.encoder.layer"]),
        ("BertForTokenClassification", BERT, ["classifier"], ["bert.encoder.layer"]),
        ("BertForMaskedLM", BERT, [], ["bert.encoder.layer"]),
        ("T5ForConditionalGeneration", T5, [], ["encoder.block", "decoder.block"]),
        ("T5ForQuestionAnswering", T5, ["qa_outputs"], ["encoder.block", "decoder.block"]),
        ("T5ForTokenClassification", T5, ["classifier"], ["transformer.encoder.block"]),
        ("BartForConditionalGeneration", BART, [],
         ["model.encoder.layers", "model.decoder.layers"]),
        ("BartForSequenceClassification", BART, ["classification_head"],
         ["model.encoder.layers", "model.decoder.layers"]),
    ],
)  # fmt: skip
def test_parts(kind, config, heads, stacks):
    name, values = config
    with torch.device("meta"):
        model = getattr(transformers, kind)(getattr(transformers, name)(**values))
    assert head_names(model) == heads
    assert writes_text(model) == (not heads)
    assert list(layer_stacks(model)) == stacks
    assert all(len(stack) == 2 for stack in layer_stacks(model).values())


def test_the_halves_of_an_encoder_decoder_are_no_heads():
    half = transformers.BertConfig(**SIZES)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(half, half)
    with torch.device("meta"):
        model = transformers.EncoderDecoderModel(config)
    assert writes_text(model)
    assert head_names(model) == []
    assert list(layer_stacks(model)) == ["encoder.encoder.layer", "decoder.bert.encoder.layer"]
