"""AWS's tutorial on tensor-parallel inference, moved to tpray: ``python tutorial.py CHECKPOINT``.

What has changed: ``neuronx_distributed`` is ``tpray``, the Hub name is a local directory, and what transformers 5 has
removed is brought up to date (``tokenizer(...)``, no ``torchscript``, self-attention without a position type).
"""

import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.bert.modeling_bert import BertSelfAttention, BertSelfOutput

import tpray
import tpray.trace
from tpray.parallel_layers import layers, parallel_state

name = sys.argv[1]
model = AutoModelForSequenceClassification.from_pretrained(name)
torch.save({"model": model.state_dict()}, "bert.pt")


def encode(tokenizer, *inputs, max_length=128, batch_size=1):
    tokens = tokenizer(*inputs, max_length=max_length, padding="max_length", truncation=True, return_tensors="pt")
    return (
        torch.repeat_interleave(tokens["input_ids"], batch_size, 0),
        torch.repeat_interleave(tokens["attention_mask"], batch_size, 0),
        torch.repeat_interleave(tokens["token_type_ids"], batch_size, 0),
    )


tokenizer = AutoTokenizer.from_pretrained(name)
sequence_0 = "The company HuggingFace is based in New York City"
sequence_1 = "Apples are especially bad for your health"
sequence_2 = "HuggingFace's headquarters are situated in Manhattan"
paraphrase = encode(tokenizer, sequence_0, sequence_2)
not_paraphrase = encode(tokenizer, sequence_0, sequence_1)


def get_model():
    model = AutoModelForSequenceClassification.from_pretrained(name)

    class ParallelSelfAttention(BertSelfAttention):
        def __init__(self, config):
            super().__init__(config)
            self.query = layers.ColumnParallelLinear(config.hidden_size, self.all_head_size, gather_output=False)
            self.key = layers.ColumnParallelLinear(config.hidden_size, self.all_head_size, gather_output=False)
            self.value = layers.ColumnParallelLinear(config.hidden_size, self.all_head_size, gather_output=False)
            self.num_attention_heads = self.num_attention_heads // parallel_state.get_tensor_model_parallel_size()
            self.all_head_size = self.all_head_size // parallel_state.get_tensor_model_parallel_size()

    class ParallelSelfOutput(BertSelfOutput):
        def __init__(self, config):
            super().__init__(config)
            self.dense = layers.RowParallelLinear(config.hidden_size, config.hidden_size, input_is_parallel=True)

    for layer in model.bert.encoder.layer:
        layer.attention.self = ParallelSelfAttention(model.config)
        layer.attention.output = ParallelSelfOutput(model.config)

    tpray.parallel_layers.load("bert.pt", model, sharded=False)
    io_aliases = {}
    return model, io_aliases


model = tpray.trace.parallel_model_trace(get_model, paraphrase, tp_degree=2)
tpray.trace.parallel_model_save(model, "tp_models")
model = tpray.trace.parallel_model_load("tp_models")
cpu_model = AutoModelForSequenceClassification.from_pretrained(name)
assert torch.argmax(model(*paraphrase)[0]) == torch.argmax(cpu_model(*paraphrase)[0])
for example in (paraphrase, not_paraphrase):
    print(float((model(*example)[0] - cpu_model(*example)[0]).abs().max()))
