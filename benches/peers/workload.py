"""The saved state: names, dtypes and shapes. Uses only the standard library, because every environment reads it."""
import math

NAMES = ("large", "small", "adam-1b")
SIZE = {"F32": 4, "BF16": 2}

# Llama-3.2-1B.
VOCABULARY, HIDDEN, MIDDLE, LAYERS, KEYS = 128256, 2048, 8192, 16, 512
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (MIDDLE, HIDDEN), "mlp.up_proj": (MIDDLE, HIDDEN),
    "mlp.down_proj": (HIDDEN, MIDDLE), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
}  # fmt: skip


def tensors(workload, scale):
    """Every tensor as (name, dtype, shape). The scale shortens the first dimension; of `small`, the list of tensors."""

    def scaled(count):
        return max(1, round(count * scale))

    if workload == "adam-1b":
        return adam(scaled)
    if workload == "large":
        return [(f"layer.{i:02}.weight", "F32", (scaled(4096), 4096)) for i in range(16)]
    parts = {"weight": (4, 1024), "bias": (4, 64)}
    return [(f"expert.{i:05}.{name}", "F32", shape) for name, shape in parts.items() for i in range(scaled(20_000))]


def adam(scaled):
    """Weights and both moments of AdamW; input and output embeddings are one tensor."""
    shapes = {"embed_tokens": (VOCABULARY, HIDDEN), "norm": (HIDDEN,)}
    shapes |= {f"layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in LAYER.items()}
    kinds = {"model": "BF16", "exp_avg": "F32", "exp_avg_sq": "F32"}
    scaled = {name: (scaled(rows), *rest) for name, (rows, *rest) in shapes.items()}
    return [(f"{kind}.{name}.weight", dtype, shape) for kind, dtype in kinds.items() for name, shape in scaled.items()]


def size(tensors):
    """Bytes of payload."""
    return sum(SIZE[dtype] * math.prod(shape) for _, dtype, shape in tensors)
