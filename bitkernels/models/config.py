"""What a Bi-Mamba is made of, and the named sizes."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

_CHOICES = {
    "binarize": ("none", "in_proj", "all"),
    "weight_format": ("binary", "ternary"),
    "scales": ("column", "row", "single"),
    "sharing": ("none", "sequence", "cycle", "cycle_rev", "universal"),
}


@dataclass(frozen=True)
class BiMambaConfig:
    """The shape of a Mamba-2 language model and which of its projections have low-bit weights.

    ``binarize`` is ``"none"`` (a full-precision Mamba-2), ``"in_proj"``, or ``"all"`` for both
    projections; ``weight_format`` is ``"binary"`` (Bi-Mamba) or ``"ternary"`` (BitLinear with int8
    activations); ``scales`` is the axis of the binary format's alpha and beta.

    ``ternary_embedding`` and ``ternary_head`` make embedding and head ternary (Slender-Mamba); both need
    ``tie_embeddings=False``. ``sharing`` says which of the ``n_layer`` positions of the stack use the same layer, of
    which ``n_unique`` are wanted (``layer_order``; not used by ``"none"`` and ``"universal"``).

    ``int8_embedding`` is for inference: a tied embedding that was rounded to 8 bits a weight.
    """

    vocab_size: int
    d_model: int
    n_layer: int
    expand: int = 2
    headdim: int = 64
    d_state: int = 128
    ngroups: int = 1
    d_conv: int = 4
    chunk_size: int = 64
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    binarize: str = "none"
    weight_format: str = "binary"
    scales: str = "column"
    ternary_embedding: bool = False
    ternary_head: bool = False
    int8_embedding: bool = False
    sharing: str = "none"
    n_unique: int = 1

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = (int, float) if field.type is float else (field.type,)
            if type(value) not in kinds:
                raise ValueError(f"config: {field.name} must be of type {field.type.__name__}, got {value!r}")
            if field.type in (int, float) and value <= 0:
                raise ValueError(f"config: {field.name} must be positive, got {value}")
            if field.name in _CHOICES and value not in _CHOICES[field.name]:
                raise ValueError(
                    f"config: {field.name} must be one of {', '.join(_CHOICES[field.name])}, got {value!r}"
                )
        if self.d_inner % self.headdim:
            raise ValueError(f"config: headdim {self.headdim} must divide expand * d_model = {self.d_inner}")
        if self.nheads % self.ngroups:
            raise ValueError(f"config: ngroups {self.ngroups} must divide the number of heads {self.nheads}")
        if self.tie_embeddings and (self.ternary_embedding or self.ternary_head):
            raise ValueError("config: a ternary embedding or head needs tie_embeddings=False")
        if self.int8_embedding and not self.tie_embeddings:
            raise ValueError("config: int8_embedding needs tie_embeddings=True")
        if self.n_unique > self.n_layer:
            raise ValueError(f"config: n_unique {self.n_unique} must be at most n_layer {self.n_layer}")

    @property
    def layer_order(self) -> list[int]:
        """Which of the layers each position of the stack uses (Slender-Mamba, Algorithm 1).

        With N = ``n_layer`` and M = ``n_unique``, ``"sequence"`` repeats each layer floor(N / M) times before the next
        one (AABB), ``"cycle"`` repeats all M in turn (ABAB), and ``"cycle_rev"`` does so too, but the last time
        backwards (ABBA).
        """
        N, M = self.n_layer, self.n_unique
        if self.sharing == "sequence":
            return [i // (N // M) for i in range(N)]
        if self.sharing == "cycle":
            return [i % M for i in range(N)]
        if self.sharing == "cycle_rev":
            forward = max(M, M * (N // M - 1))
            return [i % M if i < forward else M - 1 - i % M for i in range(N)]
        return [0] * N if self.sharing == "universal" else list(range(N))

    @property
    def low_bit(self) -> bool:
        """Whether there is anything to pack."""
        return self.binarize != "none" or self.ternary_embedding or self.ternary_head

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def nheads(self) -> int:
        return self.d_inner // self.headdim

    @property
    def d_conv_channels(self) -> int:
        """The channels of x, B and C, which pass through the convolution."""
        return self.d_inner + 2 * self.ngroups * self.d_state

    @property
    def d_in_proj(self) -> int:
        """The rows of in_proj: z, then x, B and C, then dt."""
        return self.d_inner + self.d_conv_channels + self.nheads

    def replace(self, **changes: Any) -> "BiMambaConfig":
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BiMambaConfig":
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"config: unknown fields {', '.join(unknown)}")
        if missing := sorted({"vocab_size", "d_model", "n_layer"} - set(values)):
            raise ValueError(f"config: missing fields {', '.join(missing)}")
        return cls(**values)


# The sizes of the Bi-Mamba paper, that of the Slender-Mamba paper, that of docs/results.md and the model that ships,
# and small ones to train on a CPU. The small vocabularies are placeholders for that of the tokenizer trained with the
# model.
CONFIGS = {
    "170m": BiMambaConfig(vocab_size=50288, d_model=768, n_layer=24, tie_embeddings=False),
    "780m": BiMambaConfig(vocab_size=32000, d_model=1536, n_layer=48, binarize="all"),
    "1.3b": BiMambaConfig(vocab_size=32000, d_model=2048, n_layer=48, binarize="all"),
    "2.7b": BiMambaConfig(vocab_size=32000, d_model=2560, n_layer=64, binarize="all"),
    "22m": BiMambaConfig(vocab_size=4096, d_model=512, n_layer=12, binarize="all"),
    "tiny": BiMambaConfig(vocab_size=512, d_model=64, n_layer=2, headdim=16, d_state=16, binarize="all"),
    "demo": BiMambaConfig(vocab_size=512, d_model=192, n_layer=3, headdim=32, d_state=32, binarize="all"),
}
