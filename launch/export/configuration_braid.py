"""The Hugging Face configuration of a braid."""

from typing import Any

from transformers import PretrainedConfig


class BraidConfig(PretrainedConfig):
    """architecture: the braid itself, as `ModelConfig.to_dict()` writes it; everything about its shape is there.
    residual_dtype: dtype of the residual stream, "float32" or "bfloat16". max_position_embeddings: tokens of a row in
    training; longer inputs work."""

    model_type = "braid"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        architecture: dict[str, Any] | None = None,
        residual_dtype: str = "float32",
        max_position_embeddings: int = 2048,
        **kwargs: Any,
    ) -> None:
        self.architecture = architecture or {}
        self.residual_dtype = residual_dtype
        self.max_position_embeddings = max_position_embeddings
        self.vocab_size = self.architecture.get("vocab_size", 0)
        self.hidden_size = self.architecture.get("d_model", 0)
        kwargs["tie_word_embeddings"] = self.architecture.get("tie_embeddings", False)
        for derived in ("vocab_size", "hidden_size"):
            kwargs.pop(derived, None)
        super().__init__(**kwargs)
