"""What every node needs, loaded before the process of a node is forked: see `process`.

Nothing here may ask for a GPU: CUDA would then be broken in the processes that are forked from this one. PEFT asks,
through bitsandbytes.
"""

import gc

import datasets
import transformers.modeling_utils
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama

import alignlab.benchmarks.evaluate
import alignlab.comparison.graph.work
import alignlab.training.trainer

__all__ = ["alignlab", "datasets", "transformers"]

gc.freeze()  # no collection of garbage in a node looks through all of this
