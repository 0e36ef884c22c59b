"""What a fine-tuning takes, by calculation: bytes at its peak, and floating point operations.

The model is of Llama's shape, its linear layers have LoRA, attention is sdpa with a dense mask. Counted are tensors: no
allocator's gaps, no kernel's workspace, no CUDA context.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from hf_apar.training.tuning import Tuning

PACKED = {4: 0.516, 8: 1.0}
"""Bytes of a weight in so many bits: NF4 has 32 bits more for each 256 weights of a scale's own scale, and 8 for each 64."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that memory and time depend on.

    Attributes:
        queries: width of all query heads together; ``keys`` that of the key heads.
        inner: width of the gated layer.
        tied: is the output layer that of the embeddings?
    """

    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "ModelShape":
        """Return the shape that ``config`` says."""
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.num_hidden_layers, config.hidden_size, size * config.num_attention_heads,
            size * config.num_key_value_heads, config.intermediate_size, config.vocab_size, config.tie_word_embeddings,
        )  # fmt: skip

    @property
    def linear(self) -> int:
        """Weights of all linear layers but the output layer: those that have LoRA, and may be packed."""
        return self.layers * self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.inner)

    @property
    def embeddings(self) -> int:
        """Weights of the embeddings and the output layer."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def lora(self, rank: int) -> int:
        """Return how many weights LoRA of ``rank`` adds."""
        ends = 4 * self.hidden + 2 * (self.queries + self.keys) + 3 * (self.hidden + self.inner)
        return self.layers * rank * ends


LLAMA_8B = ModelShape(32, 4096, 4096, 1024, 14336, 128256, tied=False)
LLAMA_70B = ModelShape(80, 8192, 8192, 1024, 28672, 128256, tied=False)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at the peak of a training step.

    Attributes:
        weights: of the model, which are not trained.
        adapter: LoRA and its gradients, in float32.
        optimizer: Adam's two averages of them.
        activations: what the forward pass keeps for the backward pass.
        passing: what lives for a moment, where the backward pass begins: scores of the vocabulary with their gradients, and
            the copy of the embeddings that the rows of [Fork] and [Child] are put into; with checkpointing a layer that is
            computed again, where that is more.
    """

    weights: float
    adapter: float
    optimizer: float
    activations: float
    passing: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.adapter + self.optimizer + self.activations + self.passing


def training_memory(
    shape: ModelShape, tuning: Tuning, *, bits: int | None = None, bf16: bool = False, length: int | None = None
) -> TrainingMemory:
    """Return what a step of ``tuning`` takes on one device, whose batch is ``tuning.batch_size`` rows of ``length`` tokens.

    Args:
        bits: of the packed linear layers, 4 or 8; ``None`` for float32.
        bf16: compute in bfloat16.
        length: ``tuning.max_length`` where it is not given.

    >>> memory = training_memory(LLAMA_8B, Tuning(gradient_checkpointing=True), bits=4, bf16=True)
    >>> round(memory.weights / 1e9, 1), round(memory.total / 1e9, 1)
    (7.8, 14.1)
    """
    tokens = tuning.batch_size * ((length or tuning.max_length) + 1)
    wide, narrow = 4, 2 if bf16 else 4  # bytes of a number
    trained = shape.lora(tuning.rank)
    layer = _layer(shape, tuning.rank, narrow) * tokens
    if bf16 and bits is None:
        layer += shape.linear * narrow / shape.layers  # of frozen weights the backward pass needs the narrow copies
    scores, rows = tokens * shape.vocabulary, shape.vocabulary * shape.hidden
    at_loss = scores * 3 * wide + rows * narrow
    at_output = scores * narrow + rows * (2 * narrow + (wide if bf16 else 0))
    again = tuning.gradient_checkpointing
    return TrainingMemory(
        weights=shape.linear * (wide if bits is None else PACKED[bits]) + shape.embeddings * wide,
        adapter=trained * 2 * wide,
        optimizer=trained * 2 * wide,
        activations=shape.layers * (shape.hidden * wide * tokens if again else layer),
        passing=max(at_loss, at_output, layer if again else 0),
    )


def _layer(shape: ModelShape, rank: int, narrow: int) -> float:
    """Return the bytes that a layer keeps of a token."""
    inputs = 2 * 4 * shape.hidden  # of the two norms, always wide
    normed = (2 if narrow == 4 else 5) * shape.hidden * narrow  # in bfloat16 each of five layers casts it anew
    attention = 4 * shape.queries * narrow  # queries, keys and values repeated for them, what comes out
    gated = 4 * shape.inner * narrow
    return inputs + normed + attention + gated + 7 * rank * narrow


def training_flops(shape: ModelShape, tokens: float, *, gradient_checkpointing: bool = False) -> float:
    """Return the floating point operations of a training on ``tokens``: two a weight forward, two backward.

    Frozen weights have no gradients; with checkpointing the forward pass comes twice. Attention itself is left out.

    >>> f"{training_flops(LLAMA_8B, 1e6):.1e}"
    '3.0e+16'
    """
    passes = 3 if gradient_checkpointing else 2
    return 2 * passes * tokens * (shape.linear + shape.vocabulary * shape.hidden)
