"""Models in the Hugging Face format, both ways and exact: GPT-2, Llama, BERT, RoBERTa-PreLayerNorm and ModernBERT
(BERTs normalised before adding), and Pegasus for our encoder-decoder.

Their names on one side, ours on the other. An encoder's parameters are named as in a model of encoder and heads:
`backbone.*`, `head.*` (what the task trains: MaskedLMHead, ClassificationHead or TaggingHead) and `pair_head.*` (next
sentence prediction, PairHead). A decoder and an encoder-decoder, whose heads are their own, have no prefix.
"""

from __future__ import annotations

from bigtrain.models.huggingface.configs import read_config
from bigtrain.models.huggingface.exporting import ARCHITECTURES, to_huggingface
from bigtrain.models.huggingface.importing import iterate_weights

__all__ = ["ARCHITECTURES", "iterate_weights", "read_config", "to_huggingface"]
